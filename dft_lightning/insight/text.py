"""What a row says, made fit to be shown: it may hold anything."""

from dft_lightning.errors import printable

__all__ = ["printable"]
