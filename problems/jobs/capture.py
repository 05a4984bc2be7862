"""The check of the option `capture`, before a run starts."""

from mlo import ConfigError


def check_capture(capture: bool, device: str) -> None:
    """Raise a ConfigError if rounds should be captured, and the device is no CUDA GPU."""
    from mlo.training.devices import known_device

    found = known_device(device)
    if capture and found.type != "cuda":
        raise ConfigError(
            f"capture: needs a CUDA GPU, and the device is {found.type}; write capture: false, or give another device"
        )
