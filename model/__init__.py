from model.checkpoint import load_model
from model.generate import generate
from model.llama import Llama, LlamaConfig
from model.tokenizer import load_tokenizer

__all__ = ["Llama", "LlamaConfig", "generate", "load_model", "load_tokenizer"]
