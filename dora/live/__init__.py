"""What a running job tells about itself, while it runs.

::

    model = DoraParallel(module, plan, sample=inputs)
    watching(model, folder="run/status", metrics_port=9400, qoe=QoE(step_s=1.5))

or, with the program as it is, `DORA_STATUS=run/status DORA_METRICS_PORT=9400`. Every rank then
replaces `run/status/rank-N.json` (`dora.spec.Status`) once a second, for `dora top run`, and
answers Prometheus at port 9400 + N.

recorder.py      what is noted of every call, and counted
tokens.py        the same of every token of `generate`
snapshot.py      the notes and the model's public state -> Status
relay.py         statuses of ranks on other machines, over the rendezvous store
watch.py         the thread that writes them
metrics.py       Status -> Prometheus
environment.py   who asks for it by environment variables
"""

from dora.live.watch import Watch, watching

__all__ = ["Watch", "watching"]
