"""A run's models as lm-eval sees a language model. Needs lm-eval: import it only where that is known to be there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lopt_lite.checkpoints.generation_config import GENERATION_CONFIG_NAME, end_tokens
from lopt_lite.data.templates import ChatTemplate, TemplateRefusedError, stop_token_ids
from lopt_lite.data.tokenization import token_without_row
from lopt_lite.devices import PeakMemory
from lopt_lite.errors import DataError, ModelError, SettingsError
from lopt_lite.events import Notice, OnEvent
from lopt_lite.residency.choices import Memory
from lopt_lite.results.harness_generate import complete
from lopt_lite.results.harness_scores import Scorer
from lopt_lite.results.open_run import OpenRun, open_run
from lopt_lite.settings import EvaluateSettings
from lopt_lite.units import parse_memory


class LayerStreamedLM(TemplateLM):
    """The base or the tuned model of a run (``tuned`` says which), with its layers wherever the budget lets them be.

    Tokens and texts are made as by lm-eval's own class for Hugging Face models, but for chat templates: these are
    applied as in training, so that no token is put before them and the template's end of a turn ends an answer.

    Parameters
    ----------
    run:
        An open run.
    settings:
        Those of ``lopt-lite evaluate``.
    peak:
        Since before model and tasks were read; None where work that was planned is part of it.
    """

    def __init__(self, run: OpenRun, settings: EvaluateSettings, *, peak: PeakMemory | None, on_event: OnEvent) -> None:
        super().__init__()
        self.tuned = False
        self.tokenizer = run.tokenizer
        asked = settings.max_length or resolve_max_length(run.skeleton.config, run.tokenizer)
        self.max_length = min(asked, run.skeleton.most_positions or asked)
        self._run, self._settings, self._on_event = run, settings, on_event
        self._template = ChatTemplate(run.tokenizer) if settings.apply_chat_template else None
        self._scorer = Scorer(
            run,
            max_tokens=self.max_length,
            max_rows=settings.batch_size,
            memory=self._memory,
            on_event=on_event,
        )
        self._peak = peak
        self._told_of_system_turns = False

    def _memory(self) -> Memory:
        """What there is to use now; the first time with what reading has taken (later peaks are of planned work)."""
        reached = 0 if self._peak is None else self._peak.grown_to()
        self._peak = None
        return Memory.now(self._run.device, parse_memory(self._settings.memory), reached_bytes=reached)

    # -- text to tokens -----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text, where the tokenizer has one."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ModelError(
            "the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token, and the task needs one",
            fix="set bos_token or eos_token in tokenizer_config.json",
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer."""
        return Path(self.tokenizer.name_or_path).name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens unless the text has them already.

        Raises
        ------
        DataError
            The text has a token that the model has not.
        """
        if add_special_tokens is None and (self._template is not None or self._begins_with_prefix(string)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = list(self.tokenizer(string, verbose=False, **special)["input_ids"])
        # An answer with such a token would have a score that is not a number, and be the best of all.
        problem = token_without_row(self.tokenizer, ids, self._run.skeleton.vocabulary_rows)
        if problem is not None:
            raise DataError(f"a task's text cannot be used: {problem}", fix="leave that task out")
        return ids

    def _begins_with_prefix(self, string: str) -> bool:
        prefix = self.tokenizer.bos_token or self.tokenizer.eos_token
        return has_bos_prefix(string, prefix)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; a template that refuses a system turn gets it without."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateRefusedError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise ModelError(f"the tokenizer's chat template refuses a task's prompt: {error}") from error
            if not self._told_of_system_turns:
                self._told_of_system_turns = True
                self._on_event(
                    Notice(text="The chat template refuses system turns; the tasks' descriptions are left out.")
                )
            try:
                return self._render(others, add_generation_prompt)
            except TemplateRefusedError as again:
                raise ModelError(f"the tokenizer's chat template refuses a task's prompt: {again}") from again

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        assert self._template is not None
        # Without a prompt for it, the last message is the beginning of the answer.
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    # -- what lm-eval asks --------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is what greedy decoding gives."""
        # lm-eval's bar would only show how its texts are tokenised.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = [(context, continuation) for _, context, continuation in requests]
        return [tuple(score) for score in self._scorer.scores(questions, tuned=self.tuned)]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the length that the model may see."""
        questions: list[tuple[list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [make_disjoint_window(window) for window in windows]
            questions += found
            counts.append(len(found))
        scores = iter(self._scorer.scores(questions, tuned=self.tuned))
        return [sum(next(scores).log_probability for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, without the text that ended it."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            contexts = [requests[number].args[0] for number in numbers]
            for number, answer in zip(numbers, self._answers(contexts, requests[numbers[0]].args[1]), strict=True):
                answers[number] = answer
        return answers

    def _answers(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        """Answers to prompts that ask for the same way of generating."""
        choices: dict[str, Any] = dict(normalize_gen_kwargs(asked, 256))
        max_new_tokens = choices.pop("max_gen_toks")
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(choices.pop("until", None), eos=end)
        if choices.get("temperature") == 0.0:
            choices.pop("temperature")
            choices["do_sample"] = False
        room = self.max_length - max_new_tokens
        if room < 1:
            raise SettingsError(
                f"a task asks for up to {max_new_tokens} new tokens, and the model sees {self.max_length} at once",
                fix="raise --max-length, or lower max_gen_toks in the task's file",
            )
        # Generation changes the skeleton for good, and the run's own one is still needed.
        run = open_run(self._settings.run, self._run.device)
        try:
            tokens = complete(
                run,
                [self.tok_encode(context)[-room:] for context in contexts],
                tuned=self.tuned,
                max_new_tokens=max_new_tokens,
                stop=stop,
                end_ids=self._end_ids(stop),
                choices=choices,
                max_rows=self._settings.batch_size,
                memory=self._memory(),
                on_event=self._on_event,
            )
        finally:
            run.close()
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _end_ids(self, stop: Sequence[str]) -> list[int]:
        """Tokens that end an answer: the model's own, and those that a task names by their text (``<|im_end|>``).

        With a chat template also those that training teaches to end a turn.
        """
        ends = [*end_tokens(self._run.store.directory / GENERATION_CONFIG_NAME), self.eot_token_id]
        added = self.tokenizer.get_added_vocab()
        ends += [added[text] for text in stop if text in added]
        if self._template is not None:
            ends += stop_token_ids(self.tokenizer)
        return sorted({token_id for token_id in ends if token_id is not None})
