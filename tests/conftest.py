"""What holds for all tests.

A shell without job control lets what it starts in the background ignore Ctrl-C, and so would all
processes of the tests, those too that are to show what Ctrl-C does.
"""

import signal

from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dora", deadline=None)  # the speed of a machine decides nothing
settings.load_profile("dora")
