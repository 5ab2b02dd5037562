"""How likely a model finds each option of many questions: what benchmarks with answers to choose from are scored by.

Every distinct token is computed once. Questions of a group share the beginning of their prompts (a header, solved examples),
which is run once and kept in a cache; the options of a question are branches of one tree that grows from its prompt, and
letters, of one token each, add nothing to it.

    score_options(model, [Question(prompt, options), …])      # [[Likelihood(logprob, greedy), …], …]
    score_copies(model, questions, copies)                    # the same of each member of an ensemble, in the same passes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import to_device
from model.cache import KVCache, Prefill
from model.config import rotary_phases
from model.llama import Llama
from study.errors import is_out_of_memory
from study.logging import say

MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}  # of questions in one pass, padding counted
SCORES, KEYS = 1 << 15, 4  # attention scores, and keys in hidden sizes, that go with each of them: more count as more tokens
WORTH = {"cpu": 128, "cuda": 512}  # tokens that a shared beginning must save, or its pass costs more than it spares
LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27}  # held at a time


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and of what may follow it, at least one each. group: its prompts begin alike, see the module."""

    prompt: list[int]
    options: list[list[int]]
    group: str = ""


RowKeys = Callable[[Tensor, Tensor, Tensor], Tensor]  # (copies, questions, places), (T,) each -> (T,) int32, see Llama.hidden


class Likelihood(NamedTuple):
    logprob: float  # nats, summed over the option's tokens
    greedy: bool  # whether each of them is the likeliest at its place


def score_options(
    model: Llama, questions: list[Question], *, micro_tokens: int | None = None, on_done: Callable[[int], None] | None = None
) -> list[list[Likelihood]]:
    """The likelihood of every option after its prompt, in the questions' order.  Arguments and errors as for score_copies.

    Dropout is off, also for a model in training mode, which it is again afterwards.
    """
    return score_copies(model, questions, 1, micro_tokens=micro_tokens, on_done=on_done)[0]


@torch.inference_mode()
def score_copies(
    model: Llama, questions: list[Question], copies: int, *, keys: RowKeys | None = None, micro_tokens: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[list[Likelihood]]]:  # fmt: skip
    """As score_options, `copies` times in the same passes: [copy][question][option].

    Every pass has its tokens copies times over, one copy behind the other, as the members of an ensemble want them (lora.ensemble).
    keys: dropout is on, and this chooses the masks; without it dropout is off.

    micro_tokens: most tokens in a pass; memory depends on it, results do not (but for rounding). on_done(n) hears of n finished
    questions. The model's mode is as before afterwards. Raises ValueError for an empty prompt, a question without options, or an
    empty option.
    """
    for number, question in enumerate(questions):
        if not (question.prompt and question.options and all(question.options)):
            raise ValueError(f"question {number}: prompt, options and each option need at least one token")
    kind = model.device.type
    budget = micro_tokens or MICRO_TOKENS[kind]
    results: list = [[None] * len(questions) for _ in range(copies)]
    was_training = model.training
    model.train(keys is not None)
    try:
        for shared, members in _groups(questions, WORTH[kind]):
            prefix = _prefill(model, questions[members[0]].prompt[:shared], copies, members[0], keys) if shared else None
            waiting = sorted((_lay_out(i, questions[i], shared) for i in members), key=lambda row: -len(row.ids))
            while waiting:
                longest, count = len(waiting[0].ids), 1
                while count < len(waiting) and copies * _cost(model, count + 1, longest, shared) <= budget:
                    count += 1
                try:
                    scored = _score(model, waiting[:count], prefix, copies, keys)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or count == 1:
                        raise
                    budget = copies * _cost(model, count, longest, shared) // 2
                    say(f"out of memory while scoring options: from here on {budget} tokens at a time")
                    continue
                for mine, found in zip(results, scored, strict=True):
                    for row, likelihoods in zip(waiting[:count], found, strict=True):
                        mine[row.question] = likelihoods
                waiting = waiting[count:]
                if on_done:
                    on_done(count)
    finally:
        model.train(was_training)
    return results


def _groups(questions: list[Question], worth: int) -> list[tuple[int, list[int]]]:
    """(how many tokens their prompts share, questions): the groups that share enough, and all others as one that shares none."""
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question.group, []).append(i)
    found, alone = [], []
    for members in groups.values():
        prompts = [questions[i].prompt for i in members]
        first, last = min(prompts), max(prompts)  # in order of tokens: what these two share, all do
        most = min(map(len, prompts)) - 1  # the last token of a prompt predicts the options: each keeps its own
        shared = next((k for k in range(most) if first[k] != last[k]), most)
        if (len(members) - 1) * shared >= worth:
            found.append((shared, members))
        else:
            alone += members
    return [*found, (0, alone)] if alone else found


class _Row(NamedTuple):
    """A question laid out: what is left of its prompt, then the tree of its options."""

    question: int
    ids: list[int]  # an option's last token predicts nothing that is asked, and is left out
    before: list[int]  # for each id the place of the one before it, -1 for the first
    first: int  # the place of the prompt's last token: from here on, all predict something
    paths: list[list[int]]  # of each option: the places whose states predict its tokens
    options: list[list[int]]


def _lay_out(index: int, question: Question, shared: int) -> _Row:
    ids = question.prompt[shared:]
    first, before, nodes, paths = len(ids) - 1, list(range(-1, len(ids) - 1)), {}, []
    for option in question.options:
        path = [first]
        for token in option[:-1]:
            key = path[-1], token  # options that begin alike share a branch
            if key not in nodes:
                nodes[key] = len(ids)
                ids.append(token)
                before.append(path[-1])
            path.append(nodes[key])
        paths.append(path)
    return _Row(index, ids, before, first, paths, question.options)


def _cost(model: Llama, count: int, longest: int, shared: int) -> int:
    """Tokens of a batch of rows with its padding; or more, where scores or the keys that each row holds are what takes memory."""
    config, tokens, places = model.config, count * longest, shared + longest
    keys = count * places * config.num_key_value_heads * config.head_dim
    return max(tokens, tokens * places * config.num_attention_heads // SCORES, keys // (KEYS * config.hidden_size))


class Branches:
    """The sight (see model.attention) of rows one behind the other: a token sees the prefix, its prompt and its own branch.

    Linears see no padding. Attention does: rows of (L, S) scores, whose S places are the prefix and then the row's own tokens,
    the heads of a key-value head side by side as further queries, so that no key is copied for them.
    """

    def __init__(self, model: Llama, rows: list[_Row], prefix: KVCache | None, copies: int = 1):
        config, device, self.prefix, self.copies = model.config, model.device, prefix, copies
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.shared = prefix.room if prefix else 0
        lengths = [len(row.ids) for row in rows]
        self.rows, self.longest = copies * len(rows), max(lengths)
        room = -(-(self.shared + self.longest) // 8) * 8  # CUDA's kernels want rows of the mask aligned
        self.row = to_device(torch.arange(self.rows).repeat_interleave(torch.tensor(lengths * copies)), device)  # (T,)
        self.place = to_device(torch.cat([torch.arange(n) for n in lengths]).repeat(copies), device)  # (T,) in its row
        depths = torch.tensor([depth for row in rows for depth in _depths(row)])
        cos, sin = rotary_phases(config, to_device(depths + self.shared, device))
        self.cos, self.sin = cos.repeat(copies, 1), sin.repeat(copies, 1)
        # A token sees what lies before it in its row. Not so in the tree, where branches lie behind each other.
        places = torch.arange(self.longest, device=device)[:, None]
        seen = (torch.arange(room, device=device) - self.shared <= places)[None]  # (1, L, S): one for all rows without a tree
        nodes = [(n, k) for n, row in enumerate(rows) for k in range(row.first + 1, len(row.ids))]
        if nodes:
            trees = to_device(torch.cat([_ancestors(row, self.longest) for row in rows]), device)  # (nodes, L)
            index = to_device(torch.tensor(nodes).T.contiguous(), device)
            seen = seen.repeat(len(rows), 1, 1)
            seen[index[0], index[1], self.shared : self.shared + self.longest] = trees
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=device).masked_fill_(~seen, -torch.inf)
        grouped = self.heads // self.kv_heads
        self.mask = mask[:, None].repeat(copies if nodes else 1, 1, grouped, 1)  # (rows or 1, 1, grouped L, S), added to the scores
        # Zeros and not whatever lay there: what is masked is multiplied by 0 and must not be NaN.
        self.held = torch.zeros(self.rows, 2 * self.kv_heads, room, self.head_dim, dtype=model.dtype, device=device)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        new = qkv.view(len(qkv), -1, self.head_dim)  # (T, heads + 2 kv, D)
        if self.prefix is not None:
            of_copies = self.held.unflatten(0, (self.copies, -1))  # (copies, N, 2 kv, S, D)
            of_copies[:, :, :, : self.shared] = self.prefix.layers[layer][:, None]
        self.held[self.row, :, self.shared + self.place] = new[:, self.heads :]
        query = new.new_zeros(self.rows, self.longest, self.heads, self.head_dim)
        query[self.row, self.place] = new[:, : self.heads]
        shape = self.rows, self.longest, self.kv_heads, -1, self.head_dim
        query = query.view(shape).permute(0, 2, 3, 1, 4).reshape(self.rows, self.kv_heads, -1, self.head_dim)  # (N, kv, grouped L, D)
        keys, values = self.held.chunk(2, dim=1)  # (N, kv, S, D)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
        out = out.reshape(self.rows, self.heads, self.longest, self.head_dim)
        return out[self.row, :, self.place].reshape(len(qkv), -1)


def _depths(row: _Row) -> list[int]:
    """How many tokens of the row stand before each of its tokens in the text it belongs to."""
    depths = []
    for before in row.before:
        depths.append(depths[before] + 1 if before >= 0 else 0)
    return depths


def _ancestors(row: _Row, longest: int) -> Tensor:
    """(tokens of the row's tree, longest) bool: which places of the row each of them sees."""
    seen = torch.zeros(len(row.ids) - row.first, longest, dtype=torch.bool)
    seen[0, : row.first + 1] = True  # the prompt
    for k in range(1, len(seen)):
        seen[k] = seen[row.before[row.first + k] - row.first]
        seen[k, row.first + k] = True
    return seen[1:]


def _prefill(model: Llama, ids: list[int], copies: int, question: int, keys: RowKeys | None) -> KVCache:
    """The keys and values of a shared beginning, a slot for each copy. question: the first that begins so, by which masks are drawn."""
    cache, size = KVCache(model.config, copies, len(ids), model.dtype, model.device), len(ids)
    last = torch.arange(1, copies + 1) * size - 1  # the states are not wanted: as few of them as can be
    row_keys = None
    if keys is not None:
        of_copy = torch.arange(copies).repeat_interleave(size)
        row_keys = keys(of_copy, torch.full((copies * size,), question), torch.arange(size).repeat(copies)).to(model.device)
    sight = Prefill(cache, list(range(copies)), [size] * copies)
    model.hidden(torch.tensor(ids * copies).to(model.device), sight, last.to(model.device), row_keys)
    return cache


def _score(model: Llama, rows: list[_Row], prefix: KVCache | None, copies: int, keys: RowKeys | None) -> list[list[list[Likelihood]]]:
    """The likelihoods of each row's options in each copy: one pass."""
    device, start, made = model.device, 0, 0
    wanted, sources, targets, sizes = [], [], [], []
    for row in rows:
        wanted += range(start + row.first, start + len(row.ids))
        for path, option in zip(row.paths, row.options, strict=True):
            sources += [made + place - row.first for place in path]
            targets += option
            sizes.append(len(option))
        start, made = start + len(row.ids), len(wanted)
    ids = torch.tensor([token for row in rows for token in row.ids])
    sight, row_keys = Branches(model, rows, prefix, copies), None

    def of_all(places: list[int], size: int) -> Tensor:  # the places of the first copy, then those of the others, `size` further on each
        return (torch.tensor(places) + size * torch.arange(copies)[:, None]).flatten().to(device)

    if keys is not None:
        lengths = torch.tensor([len(row.ids) for row in rows])
        questions = torch.tensor([row.question for row in rows]).repeat_interleave(lengths).repeat(copies)
        of_copy = torch.arange(copies).repeat_interleave(int(lengths.sum()))
        row_keys = keys(of_copy, questions, sight.shared + sight.place.cpu()).to(device)
    states = model.hidden(ids.repeat(copies).to(device), sight, of_all(wanted, len(ids)), row_keys)
    logprobs, hits = predict(states, model.head_weight, of_all(sources, made), of_all(targets, 0))
    options = zip(logprobs.double().cpu().split(sizes * copies), hits.cpu().split(sizes * copies), strict=True)
    found = [Likelihood(float(logprob.sum()), bool(hit.all())) for logprob, hit in options]
    ends = iter(found)
    return [[[next(ends) for _ in row.options] for row in rows] for _ in range(copies)]


def predict(states: Tensor, head: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(targets[i] | states[sources[i]]) (n,) float32, and whether that token is the likeliest (n,) bool.

    states (R, H), head (V, H). Each state meets the vocabulary once, however many targets it has. A target's own logit is
    made in float32: rounded to 16 bits, options of nearly the same likelihood would be told apart by the rounding.
    """
    totals, tops = [], []
    for block in states.split(max(1, LOGITS[states.device.type] // len(head))):
        logits = F.linear(block, head)  # (C, V)
        logprobs = F.log_softmax(logits, -1, dtype=torch.float32)
        totals.append(logits[:, 0].float() - logprobs[:, 0])  # log of the sum of exp: torch.logsumexp is ten times slower on CPU
        tops.append(logits.argmax(-1))
    total, top = torch.cat(totals), torch.cat(tops)
    own = (states[sources].float() * head[targets].float()).sum(-1)
    return (own - total[sources]).clamp_(max=0), top[sources] == targets
