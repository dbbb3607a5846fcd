"""What a script says of itself, so that nothing else has to know it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """A script's own words for the report, the checks and the checkpoints.

    A run keeps them in config.json under "card", and beside them "chance": for each stage whose
    loss has a level of chance the name of that level in a legend, and the loss.

    Attributes:
        name: the short name: `train_NAME.py`, and `runs/NAME` for its run directories.
        about: what it does, in one or two sentences for a reader who has never seen it.
        items: what it trains on, in the plural: "images".
        stages: all of its stages in their order; the last one trained gives the model to use.
        headlines: the metrics that matter, the most telling first, each with its title.
        baselines: what else is trained, beside the stages, in folders of their own.
        following: of the last stage of a run, the flags of the command that follows it. RUN is the
            run's directory, `{name}` a flag as the run was given it, if it was. Of a stage that is
            not named they are `--predict PATH --resume RUN`.
    """

    name: str
    about: str
    items: str
    stages: tuple[str, ...]
    headlines: dict[str, str] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    following: dict[str, str] = field(default_factory=dict)
