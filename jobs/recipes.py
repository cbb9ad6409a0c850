"""Named training configs: a recipe is a function that returns a whole config."""

from collections.abc import Callable

from coca.errors import BadInput
from coca.train_config import AugmentConfig, OptimizerConfig, TrainConfig
from coca.variants import small, small_resnet


def coca_base() -> TrainConfig:
    """CoCa-Base of the paper (383M parameters), its optimizer, schedule and batch (Yu et al. 2022, section 4.1)."""
    return TrainConfig(
        optimizer=OptimizerConfig(name="adafactor"),
        steps=500_000,
        batch_size=65_536,
        lanes=512,
        log_every=100,
        checkpoint_every=1_000,
    )


def scenes() -> TrainConfig:
    """2M parameters for 48-pixel pictures: minutes on two CPU cores. What `coca demo` trains."""
    return TrainConfig(
        model=small(),
        augment=AugmentConfig(min_crop_area=0.92),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.015, weight_decay=0.01),
        steps=1000,
        batch_size=96,
        lanes=12,
        log_every=10,
        checkpoint_every=100,
    )


def scenes_resnet() -> TrainConfig:
    """As `scenes`, behind a ResNet. On the demo's dataset, 2 workers on two CPU cores: 10 minutes, and as good captions
    of one object, worse ones of two (1.00 and 0.67 exact against 0.985 and 0.91)."""
    return scenes().model_copy(update={"model": small_resnet()})


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "coca_base": coca_base,
    "scenes": scenes,
    "scenes_resnet": scenes_resnet,
}


def recipe(name: str) -> TrainConfig:
    """The config of a recipe; BadInput names those that exist."""
    if name not in RECIPES:
        raise BadInput(f"there is no recipe {name!r}", f"Known are {', '.join(RECIPES)}")
    return RECIPES[name]()
