"""A Llama as lm-evaluation-harness sees one: likelihoods of continuations, of whole texts, and greedy generation.

Imports lm-eval, so it is imported only where that is used (model.harness). Token ids are those of lm-eval's own Hugging Face
backend (HFLM), so that the numbers agree with it: context and continuation are encoded as one text, the tokenizer adds its
BOS unless the text begins with one, special tokens that a text spells out are recognised, what is too long loses its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from model.attention import Pack
from model.choices import MICRO_TOKENS, Question, score_options
from model.generate import Decoder, generate
from model.llama import Llama
from model.subject import Subject
from study.errors import LetheError
from study.logging import progress

NEW_TOKENS = 256  # generated where a task does not say how many, as in HFLM
ENCODED_AT_ONCE = 1024  # requests whose texts become ids together


class HarnessModel(TemplateLM):
    """A subject for lm_eval.evaluate. Requests with one context become one question, so that a context is computed once.

    Questions of one task are one group: what all their prompts begin with is shared (model.choices). batch_size: sequences
    that are generated at a time. label: of the progress bars.
    """

    def __init__(self, subject: Subject, batch_size: int = 64, quiet: bool = False, label: str = "score"):
        super().__init__()
        self.subject, self.batch_size, self.quiet, self.label = subject, batch_size, quiet, label
        self.words = subject.tokenizer  # under the name `tokenizer` lm-eval would take it for one of transformers
        self.max_length = subject.model.config.max_position_embeddings
        self._known: dict[str, list[int]] = {}  # texts that were encoded together, for tok_encode
        self._tails: list[str] = []  # token id -> its text inside a sentence

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return self.words.end_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        return self.words.end_id if self.words.bos is None else self.words.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text. add_special_tokens None: with the tokenizer's BOS, unless the text begins with one."""
        if add_special_tokens is None and string in self._known:
            return self._known[string]
        return self._encode([string], add_special_tokens)[string]

    def _encode(self, texts: Iterable[str], special: bool | None = None) -> dict[str, list[int]]:
        """Ids by text; special as add_special_tokens of tok_encode."""
        hf, bos = self.words.hf, self.words.decode([self.prefix_token_id], skip_special=False)
        adds: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            adds[not text.startswith(bos) if special is None else special].append(text)
        found = {}
        hf.encode_special_tokens = False  # chats come as text
        try:
            for add, part in adds.items():
                found |= {text: code.ids for text, code in zip(part, hf.encode_batch(part, add_special_tokens=add), strict=True)}
        finally:
            hf.encode_special_tokens = True
        return found

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say just that) of each continuation after its context."""
        return self._score(self._pairs(requests))

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        return self._score(("", context, continuation) for _, context, continuation in requests)

    def _pairs(self, requests: list[Instance]) -> Iterator[tuple[str, list[int], list[int]]]:
        """(task, ids of the context, ids of the continuation) of each request; where one ends is TemplateLM's to say."""
        for start in range(0, len(requests), ENCODED_AT_ONCE):
            part = requests[start : start + ENCODED_AT_ONCE]
            pairs = [request.args for request in part]
            self._known = self._encode(text for context, option in pairs for text in (context.rstrip(), context + option))
            for request, (context, option) in zip(part, pairs, strict=True):
                if context:
                    ids = self._encode_pair(context, option)
                else:
                    ids = [self.prefix_token_id], self.tok_encode(option, add_special_tokens=False)
                    if ids[1][:1] == ids[0]:
                        ids = ids[0], ids[1][1:]
                yield str(request.task_name), *ids
        self._known = {}

    def _score(self, asked: Iterable[tuple[str, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Likelihoods of (task, context, continuation), in their order; each different one is computed once."""
        contexts: dict[tuple, tuple[int, dict]] = {}  # (task, context) -> number of the question, its options and their numbers
        places = []
        for task, context, option in asked:
            room = self.max_length + 1 - len(option)  # the last token is predicted and not read
            if not option or room < 1:
                size = f"{len(option)} tokens; this model has {self.max_length} positions" if option else "no tokens"
                raise LetheError(f"--harness {task}: an answer has {size}")
            key = task, tuple(context[-room:]) or (self.prefix_token_id,)
            number, options = contexts.setdefault(key, (len(contexts), {}))
            places.append((number, options.setdefault(tuple(option), len(options))))
        questions = [Question(list(context), list(map(list, options)), task) for (task, context), (_, options) in contexts.items()]
        contexts.clear()
        with progress(len(questions), self.label, "contexts", enabled=not self.quiet) as bar:
            scores = score_options(self.subject.model, questions, on_done=bar.update)
        return [tuple(scores[number][option]) for number, option in places]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of all positions; every token is scored once.

        As in HFLM a text's own BOS is scored too, after another one.
        """
        places, windows = [], []
        for place, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, cut)
            places += [place] * (len(windows) - len(places))
        totals = [0.0] * len(requests)
        with progress(len(windows), self.label, "windows", enabled=not self.quiet) as bar:
            for place, logprob in zip(places, score_windows(self.subject.model, windows, bar.update), strict=True):
                totals[place] += logprob
        return totals

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut before the first of its request's stop strings. Sampling is refused."""
        asked: dict[tuple, dict[str, list[int]]] = {}  # (new tokens, stop strings) -> context -> places
        end = self.words.decode([self.eot_token_id], skip_special=False)
        for place, request in enumerate(requests):
            context, settings = request.args[0], normalize_gen_kwargs(request.args[1], NEW_TOKENS)
            refuse_sampling(settings, request.task_name)
            new, until = settings["max_gen_toks"], tuple(handle_stop_sequences(settings["until"], end))
            if new >= self.max_length:
                raise LetheError(f"--harness {request.task_name}: answers of {new} tokens; this model has {self.max_length} positions")
            asked.setdefault((new, until), {}).setdefault(context, []).append(place)
        outputs, decoder = [""] * len(requests), Decoder(self.subject.model, self.batch_size)
        with progress(sum(map(len, asked.values())), self.label, "contexts", enabled=not self.quiet) as bar:
            for (new, until), contexts in asked.items():
                ids, room = self._encode(contexts), self.max_length - new
                prompts = [ids[context][-room:] or [self.prefix_token_id] for context in contexts]
                stops = self.words.stop_ids | self._opening(until)
                answers = generate(self.subject.model, prompts, new, stops, on_done=bar.update, decoder=decoder)
                for places, answer in zip(contexts.values(), answers, strict=True):
                    text = postprocess_generated_text(self.words.decode(answer), list(until), None)
                    for place in places:
                        outputs[place] = text
        return outputs

    def _opening(self, until: tuple[str, ...]) -> set[int]:
        """Tokens that begin with a stop string: what comes with and after them is cut, so generation can end there.

        Only of stop strings of one character: a longer one may have begun in the token before.
        """
        short = tuple(term for term in until if len(term) == 1)
        if not short:
            return set()
        if not self._tails:
            lead = self.words.encode("a")  # a token by itself loses its space to some decoders
            texts = self.words.hf.decode_batch([[*lead, token] for token in range(self.words.vocab_size)])
            self._tails = [text[len(self.words.decode(lead)) :] for text in texts]
        return {token for token, text in enumerate(self._tails) if text.startswith(short)}

    # Chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to the answer; without add_generation_prompt up to where its last turn breaks off."""
        turns, begun = [(turn["role"], turn["content"]) for turn in chat_history], ""
        if not add_generation_prompt:
            begun = turns.pop()[1].strip()
        return self.words.decode(self.words.render_prompt(tuple(turns)), skip_special=False) + begun

    @property
    def tokenizer_name(self) -> str:
        return f"{self.subject.name}-{self.words.fingerprint}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.words.template


@torch.inference_mode()
def score_windows(model: Llama, windows: list[tuple[list[int], list[int]]], on_done: Callable[[int], None]) -> list[float]:
    """Log-likelihood in nats of each window's second part after its first, packed without padding. Dropout is off.

    For parts of thousands of tokens; where there are many short ones, model.choices shares what they have in common.
    """
    found, budget = [0.0] * len(windows), MICRO_TOKENS[model.device.type]
    order = sorted(range(len(windows)), key=lambda i: -sum(map(len, windows[i])))
    was_training = model.training
    model.eval()
    try:
        while order:
            sizes = accumulate(sum(map(len, windows[i])) - 1 for i in order[:budget])
            count = max(1, sum(size <= budget for size in sizes))
            pack, order = order[:count], order[count:]
            whole = [[*context, *scored][:-1] for context, scored in (windows[i] for i in pack)]  # the last token predicts nothing
            rows, start = [], 0
            for i, ids in zip(pack, whole, strict=True):
                start += len(ids)
                rows.append(torch.arange(start - len(windows[i][1]), start))
            targets = torch.tensor([token for i in pack for token in windows[i][1]])
            ids, sight = torch.tensor([token for ids in whole for token in ids]), Pack(list(map(len, whole)), model.config, model.device)
            nll = model.nll(ids.to(model.device), sight, torch.cat(rows).to(model.device), targets.to(model.device))
            for i, part in zip(pack, nll.double().cpu().split(list(map(len, rows))), strict=True):
                found[i] = -float(part.sum())
            on_done(count)
    finally:
        model.train(was_training)
    return found


def refuse_sampling(settings: dict, task: str | None) -> None:
    """LetheError for generation settings that ask for another text than the greedy one."""
    asked = {"temperature": settings.get("temperature")} if settings.get("do_sample") and settings.get("temperature") else {}
    other = ("num_beams", "repetition_penalty", "no_repeat_ngram_size")
    asked |= {name: settings[name] for name in other if settings.get(name) not in (None, 0, 1)}
    if asked:
        told = ", ".join(f"{name} {value}" for name, value in asked.items())
        mend = "give --harness_path a folder with a copy of the task whose generation_kwargs have do_sample: false and none of these"
        raise LetheError(f"--harness {task} asks for {told}; Lethe decodes greedily. To score it so, {mend}")
