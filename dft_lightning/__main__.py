"""`dft` and `python -m dft_lightning`: help at once, everything heavy only when it is needed."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

_COMMANDS = {
    "fit": "fine-tune a model; starting the same command again goes on where it stopped",
    "validate": "mean NLL, mean p, top-1 and objective on the validation rows",
    "test": "the same on data.test_path",
    "predict": "log p, entropy, rank and weight of every token, to parquet",
    "plan": "what a fit with the same options will need: memory, FLOPs, time, and the setting that fits",
    "diagnose": "before any training: what the model makes of the data, and where each weighting would go",
    "inspect": "rows as the model sees them: mask, weight, p, borders of packing, stop tokens",
    "weightings": "what a token can be worth: all weightings, or one explained and plotted",
    "export": "a Hugging Face folder out of a checkpoint: dft export RUN/checkpoints/last.ckpt OUT",
    "demo": "fine-tune the embedded model and compare before and after: dft demo --config configs/demo.yaml",
}
_OWN = {
    "demo": "dft_lightning.demo",
    "diagnose": "dft_lightning.insight.diagnose_command",
    "export": "dft_lightning.exporting.command",
    "inspect": "dft_lightning.insight.inspect_command",
    "plan": "dft_lightning.planning.command",
    "weightings": "dft_lightning.explain.command",
}

_HELP = """usage: dft COMMAND [--config FILE ...] [--option VALUE ...]

Fine-tunes causal language models; what each token is worth is a pluggable weighting.

commands:
{commands}

  dft COMMAND --help                  all options of a command
  dft fit --print_config ...          the configuration in force, as YAML
  dft fit --model.weighting.help DFT  what a weighting is and takes

example:
  dft fit --config configs/base.yaml --config configs/dft.yaml --config configs/models/qwen2.5-math-1.5b.yaml
"""


def main(args: Sequence[str] | None = None) -> int:
    """Answer what needs no import, and hand everything else on."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:<12}{what}" for name, what in _COMMANDS.items())))
        return 0
    if given[0] == "--version":
        print(f"dft-lightning {version('dft-lightning')}")
        return 0
    if not given[0].startswith("-") and given[0] not in _COMMANDS:
        from dft_lightning.suggestions import did_you_mean

        meant = did_you_mean(given[0], _COMMANDS)
        print(f"dft: error: no command {given[0]!r}; there are {', '.join(_COMMANDS)}{meant}", file=sys.stderr)
        return 2
    if given[0] == "fit":
        return _fit(given)
    try:
        if own := _OWN.get(given[0]):
            return int(import_module(own).main(given[1:]))
        return int(import_module("dft_lightning.cli").main(given))
    except KeyboardInterrupt:
        print("dft: interrupted", file=sys.stderr)
        return 130


def _fit(given: Sequence[str]) -> int:
    """Train; a signal that comes while everything heavy is imported counts already."""
    from dft_lightning.signals import NOTICE, Preempted

    try:
        with NOTICE.watching():
            NOTICE.is_importing = True
            cli = import_module("dft_lightning.cli")
            NOTICE.is_importing = False
            return int(cli.main(given))
    except Preempted as leaving:
        print(f"dft: {leaving.why}: start the same command again", file=sys.stderr)
        return int(leaving.code or 0)


if __name__ == "__main__":
    sys.exit(main())
