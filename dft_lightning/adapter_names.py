"""Which entries of a model's state belong to an adapter, by their names in a peft model."""


def of_adapter(name: str) -> bool:
    """Whether it is an adapter's: a low-rank factor, a magnitude, or the copy of a module that is trained in full."""
    return "lora_" in name or ".modules_to_save." in name


def without_adapter(name: str) -> str:
    """The name that an entry of the adapted model has in the model without adapters."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
