"""Text to token ids and back, and the prompt templates. Needs only a folder's tokenizer.json.

Special tokens enter by id alone: content is encoded with their recognition switched off, so no user text can inject one.
Prompt and answer are tokenised apart and joined, so generation sees exactly the prefix that training saw.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from model.checkpoint import find_model, read_json
from study.errors import LetheError

CHAT_TEMPLATES = ("llama3", "llama3-bare")  # the others write plain text, for base models
TEMPLATES = (*CHAT_TEMPLATES, "plain", "response")
DATE = "26 Jul 2024"  # the template's own fallback, pinned: today's date would change the tokens every day
OPENING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Tokenizer:
    """One model's tokenizer with one template.

    template: "llama3" renders chats as Llama 3.x Instruct's own template does, "llama3-bare" leaves out the system block
    unless there is a system turn (LLaMA-Factory's llama3), "plain" is for base models: Input: … Output: …, and so is "response":
    Alpaca's opening sentences, the input under no heading, "### Response:", and the answer at once (not Alpaca's own prompt,
    which has headings for instruction and input).
    """

    def __init__(self, hf: HFTokenizer, special: dict[str, int], bos: int | None, end: list[int], template: str):
        self.hf = hf
        self.hf.encode_special_tokens = True  # "<|eot_id|>" in user text stays text
        self.hf.no_truncation()  # some exports carry their last caller's settings
        self.hf.no_padding()
        self.special, self.bos, self.template = special, bos, template
        # The closing token of an answer: end of turn in a chat, end of text otherwise.
        self.end_id = special["<|eot_id|>"] if template in CHAT_TEMPLATES else end[0]
        self.stop_ids = frozenset(end)
        self.pad_id = special.get("<|finetune_right_pad_id|>", end[0])
        self.vocab_size = hf.get_vocab_size(with_added_tokens=True)
        # Which tokens does a text become? The model in the JSON and the template say, in whatever order keys were written.
        content = json.dumps(json.loads(hf.to_str()), sort_keys=True) + template
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added, and none is recognised."""
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        """One token as it reads, for display."""
        return self.hf.decode([token], skip_special_tokens=False)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation [{"role", "content"}, …] in the template; with the answer's opening if asked."""
        return self._render([(message["role"], message["content"]) for message in messages], add_generation_prompt)

    def render_prompt(self, turns: tuple[tuple[str, str], ...]) -> list[int]:
        """Ids of everything before an answer, the answer's opening included."""
        return self._render(turns, True)

    def render_answer(self, answer: str) -> list[int]:
        """Ids of an answer with its closing token: the completion, which alone carries loss."""
        text = " " + answer.strip() if self.template == "plain" else answer.strip()
        return [*self.encode(text), self.end_id]

    def _render(self, turns, open_answer: bool) -> list[int]:
        write = {"plain": self._plain, "response": self._response}.get(self.template, self._llama3)
        return write(turns, open_answer)

    def _llama3(self, turns, open_answer: bool) -> list[int]:
        """Llama 3.x Instruct. Every turn: header, two newlines, trimmed content, <|eot_id|>. One BOS."""
        newlines = self.encode("\n\n")

        def header(role: str) -> list[int]:
            return [self.special["<|start_header_id|>"], *self.encode(role), self.special["<|end_header_id|>"]]

        system, turns = ("", turns) if not turns or turns[0][0] != "system" else (turns[0][1].strip(), turns[1:])
        if self.template == "llama3":
            system = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n{system}"
        ids = [self.bos]
        if system:
            # "\n\n" and a system text are one string in the chat template, and a tokenizer may join across them.
            ids += header("system") + self.encode("\n\n" + system) + [self.special["<|eot_id|>"]]
        for role, content in turns:
            ids += header(role) + self._body(content.strip()) + [self.special["<|eot_id|>"]]
        return ids + header("assistant") + newlines if open_answer else ids

    def _body(self, content: str) -> list[int]:
        return self.encode("\n\n") + self.encode(content)

    def _plain(self, turns, open_answer: bool) -> list[int]:
        """Base models: "Input: …", newline, "Output:"; the answer follows after a space. Earlier turns stand before it."""
        text = ""
        openings = {"user": "Input: ", "assistant": "Output: ", "system": ""}
        for role, content in turns:
            text += f"{self._known(role, openings)}{content.strip()}\n"
        return self._with_bos(text + "Output:" if open_answer else text.rstrip("\n"))

    def _response(self, turns, open_answer: bool) -> list[int]:
        """Paragraphs: the opening, a system text, each input, each answer behind "### Response:", which stands last for the next."""
        openings = {"user": "", "assistant": "### Response:", "system": ""}
        parts = [OPENING, *(self._known(role, openings) + content.strip() for role, content in turns)]
        return self._with_bos("\n\n".join([*parts, openings["assistant"]] if open_answer else parts))

    def _known(self, role: str, openings: dict[str, str]) -> str:
        if role not in openings:
            raise LetheError(f"the role {role!r} is unknown to the {self.template} template; known: {', '.join(openings)}")
        return openings[role]

    def _with_bos(self, text: str) -> list[int]:
        return ([] if self.bos is None else [self.bos]) + self.encode(text)


def load_tokenizer(path: str | Path, template: str = "auto") -> Tokenizer:
    """Loads the tokenizer of a model folder, a hub id, or "nano".

    template "auto": llama3 where the folder carries a chat template and Llama 3's header tokens, else plain.
    Raises LetheError when tokenizer.json is missing or cut, or the template does not fit the vocabulary.
    """
    folder = find_model(str(path))
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise LetheError(f"{file} is missing; copy it from the model's original folder (a tokenizer.model alone is not enough)")
    try:
        hf = HFTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise LetheError(f"{file} is cut or no tokenizer file ({error}); fetch it again") from error
    special = {token.content: number for number, token in hf.get_added_tokens_decoder().items() if token.special}
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    chat = "<|start_header_id|>" in special and "<|eot_id|>" in special
    has_template = "chat_template" in settings or (folder / "chat_template.jinja").is_file()
    if template == "auto":
        template = "llama3" if chat and has_template else "plain"
    if template not in TEMPLATES:
        raise LetheError(f"--template {template!r} is unknown; known: auto, {', '.join(TEMPLATES)}")
    if template in CHAT_TEMPLATES and not chat:
        raise LetheError(f"--template {template} needs Llama 3's special tokens, which {file} lacks; use --template plain")

    def named(key: str) -> int | None:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return hf.token_to_id(value) if value else None

    bos = special.get("<|begin_of_text|>", named("bos_token"))
    # Llama 3 ends a text, a message or a turn; anything else that the tokenizer calls its end stops too.
    ends = [special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if name in special]
    if (eos := named("eos_token")) is not None and eos not in ends:
        ends.insert(0, eos)
    if not ends:
        raise LetheError(f"{folder}/tokenizer_config.json names no eos_token, so answers could never end")
    return Tokenizer(hf, special, bos, ends, template)
