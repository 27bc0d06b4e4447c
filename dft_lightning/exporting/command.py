"""`dft export CHECKPOINT OUT`: a Hugging Face folder out of a run's checkpoint, on one CPU."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dft_lightning.adapter_names import of_adapter
from dft_lightning.disk import writing
from dft_lightning.errors import UserError, printable
from dft_lightning.quiet import quieten
from dft_lightning.suggestions import did_you_mean

if TYPE_CHECKING:
    from dft_lightning.exporting.stored import Stored

_HELP = """Makes a Hugging Face folder out of a checkpoint: safetensors in shards, tokenizer, generation config, card.
Configuration and tokenizer come from where the run had them, the weights from the checkpoint alone; the optimizer's
state is not read. An adapter is written as such."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as everywhere in `dft`."""
        if choice := re.search(r"argument --(\w+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            meant = did_you_mean(choice[2], re.findall(r"\w+", choice[3]))
            message = f"--{choice[1]} is {choice[2]!r}; expected one of {choice[3]}{meant}"
        self.exit(2, f"dft: error: {message}\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """An error that names the first option that there is not, and the nearest that there is."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in (*known, "--"):
                meant = did_you_mean(name, known) or f"; it has {', '.join(known)}"
                self.error(f"{name}: no such option of dft export{meant}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="dft export", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="such as runs/default/checkpoints/last.ckpt"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that is not there yet")
    merge = "add an adapter's product to the weights it adapts, and write a model without adapter"
    parser.add_argument("--merge_lora", type=_bool, default=False, metavar="true|false", help=merge)
    averaged = "of a run that averages its weights: the averages (default), or the weights trained last"
    parser.add_argument("--which", choices=["averaged", "current"], help=averaged)
    parser.add_argument("--stop_tokens", nargs="+", default=[], metavar="TOKEN", help="also end an answer")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of one file of weights (5GB)")
    parser.add_argument(
        "--model_name", help="where configuration and tokenizer are by now, if not where the run had them"
    )
    trust = (
        "run code that comes with the model or tokenizer; only for sources you trust; what the run had does not count"
    )
    parser.add_argument("--trust_remote_code", type=_bool, default=False, metavar="true|false", help=trust)
    return parser


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def export(given: argparse.Namespace) -> dict[str, Any]:
    """Write the folder; what there is to say of it.

    Raises:
        UserError: see `read_stored`; or the folder is there already, or there is no adapter to merge.
    """
    out: Path = given.out
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; give a folder that does not, or remove it")
    from dft_lightning.exporting.folder import add_stops, stop_ids, write_model
    from dft_lightning.exporting.stored import read_stored

    stored = read_stored(given.checkpoint, given.which, given.trust_remote_code)
    has_adapter = stored.options["lora"] is not None
    if given.merge_lora and not has_adapter:
        raise UserError(f"--merge_lora true, but {given.checkpoint} is of a run without adapter: leave it out")
    stored.refuse_code(given.model_name)
    tokenizer = stored.tokenizer(given.model_name)
    model = (stored.merged if given.merge_lora else stored.model)(given.model_name)
    base = model.get_base_model() if has_adapter and not given.merge_lora else model
    add_stops(base.generation_config, stop_ids(tokenizer, given.stop_tokens))
    with writing(out.parent, "OUT"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with_base = stored.base_is_merged and not given.merge_lora
    write_model(model, tokenizer, out, _card(stored, given), given.max_shard_size, with_base=with_base)
    kind = "an adapter" if has_adapter and not given.merge_lora else "a model"
    adapted = {name: weight for name, weight in model.named_parameters() if of_adapter(name) or weight.requires_grad}
    counted = adapted if kind == "an adapter" else dict(model.named_parameters())
    return {"kind": kind, "parameters": sum(weight.numel() for weight in counted.values()), "step": stored.step}


def _card(stored: "Stored", given: argparse.Namespace) -> str:
    from dft_lightning.exporting.card import card, logged_metrics

    run_dir = given.checkpoint.absolute().parent.parent
    metrics = logged_metrics(run_dir, stored.step)
    return card(stored.options, stored.facts, stored.step, metrics, run_dir, given.merge_lora)


def main(args: Sequence[str]) -> int:
    """Run `dft export` with these arguments; 2 where they cannot be used."""
    parser = _parser()
    parser.refuse_unknown(args)
    given = parser.parse_args(args)
    quieten()
    try:
        done = export(given)
    except (UserError, OSError) as error:
        print(f"dft: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    print(f"Wrote {done['kind']} ({done['parameters']:,} parameters, step {done['step']:,}) to {printable(given.out)}")
    return 0
