"""Settings that could not work are refused at once."""

import pytest

from coca.errors import BadInput
from coca.typed_config import resolve_config
from pipelines.config import RefreshConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fetch.allow_networks=[localhost]", "'localhost' is not a network in CIDR notation"),
        ("fetch.max_bytes_in_flight=1000", "a largest body would never fit"),
        ("judge.min_words=300", "a minimum is above its maximum"),
        ("image.resize=stretch", "image.resize"),
        ("image.limits.formats=[tiff]", "image.limits.formats"),
        ("fetch.timeout=3", "unknown config key 'fetch.timeout'. Did you mean 'timeout_s'?"),
    ],
)
def test_refused(setting: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve_config(RefreshConfig(), sets=[setting])
    assert message in str(caught.value)


def test_settings_survive_their_own_yaml() -> None:
    import yaml

    config = resolve_config(RefreshConfig(), sets=["fetch.allow_networks=[127.0.0.0/8]", "image.resize=border"])
    assert RefreshConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
