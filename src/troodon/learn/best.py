"""Which weights of a run are the best, by its quick k-NN readings. No torch here."""

Reading = tuple[int, float]  # steps done, 0 for the weights that a run began with; and the accuracy

NOISE = 0.02  # share of the best reading by which another one must be lower to be worse: that of 1,000 images


def readings(records: list[dict], last_step: float) -> list[Reading]:
    """The readings among the records of a run, up to the weights after so many steps."""
    return [(r["step"] + 1, r["knn"]) for r in records if "knn" in r and r["step"] < last_step]


def best(readings: list[Reading]) -> Reading:
    """The highest; of several, the first."""
    return max(readings, key=lambda reading: reading[1])


def is_kept(readings: list[Reading], patience: int, step: int) -> bool:
    """Whether the weights after `step` are what a run keeps as its backbone: the best, or without patience the last."""
    return not (patience and readings) or best(readings)[0] == step


def given_up(readings: list[Reading], patience: int) -> bool:
    """Whether the last `patience` readings are all worse than the best one, which came before them."""
    return 0 < patience < len(readings) and best(readings[-patience:])[1] < (1 - NOISE) * best(readings)[1]
