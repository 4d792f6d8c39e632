"""What a plan takes when media and devices are faster or slower than the cluster says.

The planner's own prediction, on a network with other rates and devices with other speeds::

    predict = Predictor(profile, cluster, workload, qoe)
    predict(plan, Conditions.of({"wifi": 0.3}))

A plan depends on the media and devices that it touches alone. Factors are rounded to steps of a few
percent, so that in a long run most questions have been answered before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import exp, inf, log
from typing import Any, NamedTuple

from dora.adapter.migrate import migration, placed, switch_cost
from dora.planner.layouts import layout_of
from dora.planner.limits import Limit, limits, measure
from dora.planner.predict import (
    Layout,
    Setting,
    as_step,
    evaluate,
    is_linked,
    memory_share,
    setting,
)
from dora.simulator import network_of
from dora.spec import (
    Cluster,
    Conditions,
    Device,
    Forecast,
    Link,
    ModelProfile,
    Plan,
    PowerMode,
    QoE,
    SwitchCost,
    Workload,
)

# Factors are rounded to powers of this. Most predictions move by less than half a step, 2 %.
STEP = 1.04
# A medium at less than this share of its rate carries next to nothing, and predictions stay finite.
LEAST_RATE = 1e-3
# Plans made on the fly, such as those with other shares, are forgotten beyond that many.
MAX_KNOWN = 512


class _Known(NamedTuple):
    """A plan ready to be priced. `plan` is kept so that its id stays its own."""

    plan: Plan
    layout: Layout | None
    setting: Setting
    touched: frozenset[str]
    peaks: tuple[float, ...]
    answers: dict[Conditions, Forecast | None]


class Predictor:
    """Answers what plans take under conditions; remembers what it was asked.

    Args:
        profile: With timings for every device.
        cluster: As given to the planner.
        workload: What is run.
        qoe: Whose bounds a forecast's excess is about.
    """

    def __init__(
        self, profile: ModelProfile, cluster: Cluster, workload: Workload, qoe: QoE
    ) -> None:
        self.profile, self.cluster, self.workload, self.qoe = profile, cluster, workload, qoe
        found = limits(workload, qoe)
        # Compression does not depend on conditions; the planner has judged it.
        self.limits: tuple[Limit, ...] = tuple(
            limit for limit in found if limit.field != "max_accuracy_loss"
        )
        self._known: dict[int, _Known] = {}
        self._settings: dict[int, Setting] = {}
        # Of the plans that were asked about: on a campus those are few.
        self._names: frozenset[str] = frozenset()
        self._links: dict[tuple[str, str], Link] = {}
        self._scaled: dict[Conditions, tuple[tuple[Device, ...], Any]] = {}
        # By id, with what keeps the id its own: rounded conditions, by the names they are for.
        self._asked: dict[int, tuple[Conditions, dict[frozenset[str], Conditions]]] = {}
        self.num_priced = 0

    def __call__(self, plan: Plan, conditions: Conditions) -> Forecast | None:
        """Returns the forecast, None if a device of the plan has gone or a link is missing."""
        known = self._known.get(id(plan)) or self._learn(plan)
        if known.layout is None:
            return None
        touched = self._rounded(conditions, known.touched)
        if touched not in known.answers:
            # On the network of all names in use, which the plans of one decision share.
            every = self._rounded(conditions, self._names)
            known.answers[touched] = self._price(known, every)
        return known.answers[touched]

    def _rounded(self, conditions: Conditions, names: frozenset[str]) -> Conditions:
        """Returns the same as `rounded`, once for all plans that touch the same."""
        if id(conditions) not in self._asked:
            if len(self._asked) >= MAX_KNOWN:
                self._asked.clear()
            self._asked[id(conditions)] = conditions, {}
        _, answers = self._asked[id(conditions)]
        if self._names not in answers:
            answers[self._names] = rounded(conditions, self._names)
        if names not in answers:
            factors, delays = answers[self._names]
            answers[names] = Conditions(
                tuple(pair for pair in factors if pair[0] in names),
                tuple(pair for pair in delays if pair[0] in names),
            )
        return answers[names]

    @property
    def usual_s(self) -> float:
        """The seconds that an item may take, by what bounds its time; infinite if nothing does."""
        qoe = self.qoe
        if qoe.tpot_s is not None:
            return (qoe.ttft_s or 0.0) + max(self.workload.new_tokens - 1, 0) * qoe.tpot_s
        found = qoe.step_s or qoe.latency_s or qoe.ttft_s
        return found or (1 / qoe.frame_rate_hz if qoe.frame_rate_hz else inf)

    def touched(self, plan: Plan) -> frozenset[str]:
        """Returns the devices and media whose factors a plan depends on."""
        return (self._known.get(id(plan)) or self._learn(plan)).touched

    def memory_bytes(self, plan: Plan) -> dict[str, float]:
        """Returns what each device of a plan needs."""
        known = self._known.get(id(plan)) or self._learn(plan)
        if known.layout is None:
            return {}
        names = [known.setting.devices[d].name for d in known.layout.devices]
        return dict(zip(names, known.peaks, strict=True))

    def _learn(self, plan: Plan) -> _Known:
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        m = plan.num_microbatches
        if m not in self._settings:
            like = next(iter(self._settings.values()), None)
            self._settings[m] = setting(self.profile, self.cluster, self.workload, m, like=like)
        base = self._settings[m]
        layout: Layout | None = layout_of(plan, base)
        assert layout is not None
        step = as_step(layout, base, base.costs)
        peaks: tuple[float, ...] = ()
        if not is_linked(layout.groups, base) or memory_share(layout, base, step)[0] > 1:
            layout = None
        else:
            peaks = evaluate(layout, base, step).peak_bytes
        known = _Known(plan, layout, base, self._touch(plan), peaks, {})
        self._known[id(plan)] = known
        return known

    def _touch(self, plan: Plan) -> frozenset[str]:
        """Returns the devices and media of a plan, which networks have from now on."""
        devices = set(placed(plan))
        if self.workload.source is not None:
            devices.add(self.workload.source)
        links = {
            (link.src, link.dst): link
            for link in self.cluster.links
            if link.src in devices and link.dst in devices
        }
        names = frozenset(devices | {name for link in links.values() for name in link.media})
        if not (names <= self._names and links.keys() <= self._links.keys()):
            self._names, self._links = self._names | names, self._links | links
            self._scaled.clear()
            self._asked.clear()
        return names

    def _price(self, known: _Known, conditions: Conditions) -> Forecast | None:
        factors = dict(conditions.factors)
        if any(factors.get(name, 1.0) <= 0 for name in placed(known.plan)):
            return None
        source = self.workload.source
        if source is not None and factors.get(source, 1.0) <= 0:
            return None
        assert known.layout is not None
        self.num_priced += 1
        devices, network = self._conditioned(conditions)
        modes = {**{d: "default" for d in known.layout.devices}, **dict(known.layout.modes)}
        layout = known.layout._replace(modes=tuple(sorted(modes.items())))
        scaled = known.setting._replace(devices=devices, network=network)
        found = evaluate(layout, scaled, peaks=known.peaks)
        excess = tuple(
            limit.excess(measure(limit.field, layout, found, scaled)) for limit in self.limits
        )
        battery_j = measure("battery_j", layout, found, scaled)
        return Forecast(found.makespan_s, found.total_j, excess, battery_j)

    def _conditioned(self, conditions: Conditions) -> tuple[tuple[Device, ...], Any]:
        if conditions not in self._scaled:
            if len(self._scaled) >= MAX_KNOWN:
                del self._scaled[next(iter(self._scaled))]
            used = self.cluster.model_copy(update={"links": tuple(self._links.values())})
            scaled = under(used, conditions)
            names = [device.name for device in self.cluster.devices]
            self._scaled[conditions] = scaled.devices, network_of(scaled, names)
        return self._scaled[conditions]


def rounded(conditions: Conditions, names: Collection[str]) -> Conditions:
    """Returns the conditions of some names, with factors rounded and those of 1 left out."""
    factors, delays = (
        tuple(
            (name, near)
            for name, factor in pairs
            if name in names and (near := _near(factor)) != 1.0
        )
        for pairs in conditions
    )
    return Conditions(factors, delays)


def _near(factor: float) -> float:
    if factor <= 0:
        return 0.0
    return exp(round(log(max(factor, LEAST_RATE)) / log(STEP)) * log(STEP))


def under(cluster: Cluster, conditions: Conditions) -> Cluster:
    """Returns the cluster as it is under those conditions; what has gone is merely very slow."""
    factors, delays = dict(conditions.factors), dict(conditions.delays)
    media = tuple(
        m.model_copy(
            update={
                "rate_bytes_per_s": m.rate_bytes_per_s * max(factors.get(m.name, 1.0), LEAST_RATE),
                "latency_s": m.latency_s * delays.get(m.name, 1.0),
            }
        )
        if m.name in factors or m.name in delays
        else m
        for m in cluster.media
    )
    devices = tuple(
        _slowed(d, max(factors[d.name], LEAST_RATE)) if d.name in factors else d
        for d in cluster.devices
    )
    return cluster.model_copy(update={"media": media, "devices": devices})


def _slowed(device: Device, factor: float) -> Device:
    """Returns a device that does everything that much faster, in every power mode."""
    names = ["default", *(m.name for m in device.power_modes if m.name != "default")]
    modes = [device.power_mode(name) for name in names]
    return device.model_copy(
        update={
            "power_modes": tuple(
                PowerMode.model_construct(
                    name=m.name,
                    speed_factor=m.speed_factor * factor,
                    power_factor=m.power_factor,
                )
                for m in modes
            ),
            # What codecs are priced by; the rest of a device's speed is in the profile.
            "mem_bandwidth_bytes_per_s": device.mem_bandwidth_bytes_per_s * factor,
            "dispatch_s": device.dispatch_s / factor,
        }
    )


def scaled_profile(profile: ModelProfile, factors: Mapping[str, float]) -> ModelProfile:
    """Returns the profile as it would be measured on devices that much faster."""
    blocks = tuple(
        block.model_copy(
            update={
                "costs": tuple(
                    cost.model_copy(
                        update={
                            "timings": tuple(
                                t.model_copy(
                                    update={
                                        "forward_s": t.forward_s / factors.get(t.device, 1.0),
                                        "backward_s": t.backward_s / factors.get(t.device, 1.0),
                                    }
                                )
                                for t in cost.timings
                            )
                        }
                    )
                    for cost in block.costs
                )
            }
        )
        for block in profile.blocks
    )
    rates = tuple(
        rate.model_copy(
            update={
                "encode_s_per_byte": rate.encode_s_per_byte / factors.get(rate.device, 1.0),
                "decode_s_per_byte": rate.decode_s_per_byte / factors.get(rate.device, 1.0),
                "call_s": rate.call_s / factors.get(rate.device, 1.0),
            }
        )
        for rate in profile.codec_rates
    )
    return profile.model_copy(update={"blocks": blocks, "codec_rates": rates})


def block_bytes(profile: ModelProfile, workload: Workload) -> tuple[int, ...]:
    """Returns what moves with each block: weights, and optimizer state if it is trained."""
    state = workload.optimizer_bytes_per_param if workload.kind == "train" else 0.0
    return tuple(int(b.param_bytes + state * b.num_params) for b in profile.blocks)


def pricer(
    predict: Predictor, held: Callable[[], Mapping[str, frozenset[int]]]
) -> Callable[[tuple[Plan, ...], Plan, Conditions], SwitchCost]:
    """Returns what asks for the cost of a switch, given what is held at the time of asking."""
    sizes = block_bytes(predict.profile, predict.workload)
    is_live = predict.workload.kind == "train"

    def price(before: tuple[Plan, ...], after: Plan, conditions: Conditions) -> SwitchCost:
        gone = {name for name, factor in conditions.factors if factor <= 0}
        found = migration(held(), after, sizes, predict.cluster, conditions=conditions, gone=gone)
        return switch_cost(found, predict.cluster, is_live=is_live)

    return price
