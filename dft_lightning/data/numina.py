"""`NuminaMathDataModule`: the data of the DFT paper (arXiv 2508.05629)."""

from typing import Any, Literal

from dft_lightning.data.datamodule import ChatDataModule


class NuminaMathDataModule(ChatDataModule):
    """NuminaMath-CoT (Apache-2.0, 859,494 problems with solutions), rendered as the DFT paper did.

    The problem is one user turn, without a suffix; the answer is the raw solution and the tokenizer's eos token.
    Arguments are those of `ChatDataModule`; `path` takes local files of the same columns in place of the hub set. Its
    column `messages` is the same problem and solution, so that `ignore` is by default the one of both that is not read.
    """

    def __init__(
        self,
        path: str | None = None,
        dataset: str | None = None,
        messages: str | None = None,
        prompt: str | None = "problem",
        completion: str | None = "solution",
        end_of_response: Literal["template", "eos"] = "eos",
        ignore: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if path is None and dataset is None:
            dataset = "AI-MO/NuminaMath-CoT"
        if ignore is None:
            ignore = sorted({"messages", "problem", "solution"} - {messages, prompt, completion})
        super().__init__(
            path,
            dataset,
            messages=messages,
            prompt=prompt,
            completion=completion,
            end_of_response=end_of_response,
            ignore=ignore,
            **kwargs,
        )
