import math

from hypothesis import given, settings
from hypothesis import strategies as st

from dora._C import Arbiter


class Medium:
    """An arbiter, and ranks that follow its orders; checks what must always hold."""

    def __init__(self, aging_s=math.inf):
        self.arbiter = Arbiter(aging_s)
        self.holder = None
        self.is_revoked = False
        self.allowed = []  # in order
        self.wishes = {}  # rank -> (class, deadline)

    def follow(self, orders):
        for kind, rank in orders:
            if kind == "allow":
                assert self.holder is None, "two holders"
                assert rank in self.wishes
                self.holder, self.is_revoked = rank, False
                self.allowed.append(rank)
            else:
                assert (kind, rank) == ("revoke", self.holder)
                assert not self.is_revoked, "revoked twice"
                self.is_revoked = True
        assert self.arbiter.holder == self.holder
        assert self.holder is not None or not self.wishes, "the medium lies idle"
        return orders

    def want(self, rank, traffic_class, deadline=0.0, now_s=0.0):
        self.wishes[rank] = (traffic_class, deadline)
        return self.follow(self.arbiter.want(rank, traffic_class, deadline, now_s))

    def give_back(self, rank, now_s=0.0):
        self.wishes.pop(rank, None)
        if self.holder == rank:
            self.holder = None
        return self.follow(self.arbiter.give_back(rank, now_s))

    def tick(self, now_s):
        return self.follow(self.arbiter.tick(now_s))


def test_medium_is_lent_at_once_and_kept_until_given_back():
    medium = Medium()
    assert medium.want(3, 2) == [("allow", 3)]
    assert medium.want(3, 2) == []
    assert medium.want(1, 2) == []  # an equal wish waits
    assert medium.tick(1e9) == []
    assert medium.give_back(3) == [("allow", 1)]
    assert medium.give_back(1) == []
    assert medium.arbiter.holder is None


def test_better_wish_revokes_the_holder_once():
    medium = Medium()
    medium.want(1, 3)
    assert medium.want(2, 2) == [("revoke", 1)]
    assert medium.want(3, 1) == []
    assert medium.tick(1.0) == []
    assert medium.give_back(1) == [("allow", 3)]
    assert medium.want(4, 0) == [("revoke", 3)]  # once for each lend


def test_holder_that_lowers_its_priority_is_revoked():
    medium = Medium()
    medium.want(1, 2)
    assert medium.want(2, 3) == []
    assert medium.want(1, 4) == [("revoke", 1)]


def test_waiting_rank_that_raises_its_priority_revokes_the_holder():
    medium = Medium()
    medium.want(1, 2, 5.0)
    assert medium.want(2, 2, 6.0) == []
    assert medium.want(2, 2, 4.0) == [("revoke", 1)]


def test_lost_holder_frees_the_medium():
    medium = Medium()
    medium.want(1, 1)
    medium.want(2, 4)
    assert medium.give_back(1) == [("allow", 2)]
    assert medium.give_back(1) == []  # again, or never known: harmless
    assert medium.give_back(77) == []


def test_waiting_rank_that_is_lost_is_forgotten():
    medium = Medium()
    medium.want(1, 2)
    medium.want(2, 3)
    assert medium.give_back(2) == []
    assert medium.give_back(1) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(allow_nan=False)), min_size=1, max_size=12))
def test_order_is_class_then_deadline_then_first_come(priorities):
    medium = Medium()
    medium.want(99, 0, -math.inf)
    for rank, (traffic_class, deadline) in enumerate(priorities):
        assert medium.want(rank, traffic_class, deadline) == []
    while medium.holder is not None:
        medium.give_back(medium.holder)
    ranks = range(len(priorities))
    assert medium.allowed[1:] == sorted(ranks, key=lambda rank: (*priorities[rank], rank))


def test_changed_wish_keeps_its_place_among_equals():
    medium = Medium()
    medium.want(9, 0)
    medium.want(1, 4)
    medium.want(2, 3)
    medium.want(1, 3)
    assert medium.give_back(9) == [("allow", 1)]


@given(st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_random_use_has_one_holder_and_never_idles(random):
    medium, now_s = Medium(aging_s=1.0), 0.0
    for _ in range(150):
        now_s += random.choice([0.0, 0.1, 0.7])
        rank = random.randrange(5)
        match random.choice(["want", "want", "give_back", "tick"]):
            case "want":
                medium.want(rank, random.randrange(5), float(random.randrange(3)), now_s)
            case "give_back":
                medium.give_back(rank, now_s)
            case "tick":
                medium.tick(now_s)


@given(st.lists(st.integers(2, 4), min_size=2, max_size=6), st.booleans())
@settings(max_examples=100)
def test_every_wish_is_allowed_if_revoked_holders_give_back(classes, asks_again):
    medium, aging_s, now_s = Medium(aging_s=1.0), 1.0, 0.0
    for rank, traffic_class in enumerate(classes):
        medium.want(rank, traffic_class)
    # Each holder has work without end and gives back only when it is revoked.
    for _ in range(10 * 5 * len(classes)):
        now_s += aging_s / 10
        medium.tick(now_s)
        if medium.is_revoked:
            rank = medium.holder
            medium.give_back(rank, now_s)
            if asks_again:
                medium.want(rank, classes[rank], 0.0, now_s)
    assert set(medium.allowed) >= set(range(len(classes)))


def test_aged_wish_gets_a_turn_and_not_the_medium_for_good():
    medium = Medium(aging_s=1.0)
    medium.want(1, 3)
    medium.want(2, 4)
    assert medium.tick(0.9) == []
    assert medium.tick(1.0) == [("revoke", 1)]  # now equals; the holder has had its turn
    medium.give_back(1, 1.0)
    assert medium.want(1, 3, 0.0, 1.0) == []
    assert medium.tick(1.9) == []
    assert medium.tick(2.0) == [("revoke", 2)]


def test_aged_wish_never_passes_urgent_ones():
    medium = Medium(aging_s=1.0)
    medium.want(1, 1)
    medium.want(2, 4, -1e9)
    for now_s in range(1, 100):
        assert medium.tick(float(now_s)) == []
    medium.want(3, 1, 0.0, 99.0)
    assert medium.give_back(1, 99.0) == [("allow", 3)]


def test_wish_that_is_out_of_range_counts_as_the_lowest():
    medium = Medium()
    medium.want(9, 0)
    medium.want(1, 200, -1.0)
    medium.want(2, 4, math.nan)
    medium.want(3, 4, 0.0)
    while medium.holder is not None:
        medium.give_back(medium.holder)
    assert medium.allowed == [9, 1, 3, 2]
