"""What every test needs before torch and Triton are imported, and the fixtures that several files share."""

import hashlib
import http.server
import json
import os
import signal
import threading
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test leaves this machine; those about the hub run their own server
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own, and so have the processes that its tests start
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MODEL_NAME", None)  # names the model of a batch and of features

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits it; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of released data sets and tokenizers that LETHE_REAL_DATA names; the test is skipped without it."""
    if "LETHE_REAL_DATA" not in os.environ:
        pytest.skip("LETHE_REAL_DATA: a folder of the released files")
    return Path(os.environ["LETHE_REAL_DATA"])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A model folder: the nano tokenizer, and random weights of two narrow layers."""
    from tiny import NARROW, raw_config, write_folder

    return str(write_folder(tmp_path_factory.mktemp("model") / "tiny", raw_config(**NARROW), tokenizer=True))


@pytest.fixture
def hub():
    """A stand-in for the Hugging Face hub: (url, files, asked). files {owner/name/path: bytes} are what it holds, models
    and data sets alike; a repository whose owner is "gated" lists its files and refuses them. asked: the request lines."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            parts = self.path.split("?")[0].strip("/").split("/")
            listing = parts[0] == "api"
            parts = parts[2:] if listing else parts[1:] if parts[0] == "datasets" else parts
            repo, rest = "/".join(parts[:2]), parts[2:]  # rest: resolve/revision/file..., revision/main or tree/commit
            held = {name[len(repo) + 1 :]: data for name, data in files.items() if name.startswith(repo + "/")}
            if not held:
                self.answer(404, code="RepoNotFound")
            elif listing and rest and rest[0] == "tree":
                tree = [{"type": "file", "path": p, "size": len(d), "oid": digest(d)[:40]} for p, d in held.items()]
                self.answer(200, json.dumps(tree).encode())
            elif listing:
                self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": p} for p in held]}).encode())
            elif repo.startswith("gated/"):
                self.answer(403, code="GatedRepo")
            elif (name := "/".join(rest[2:])) in held:
                self.answer(200, held[name])
            else:
                self.answer(404, code="EntryNotFound")

        def do_HEAD(self):
            self.do_GET()

        def answer(self, status, data=b"", code=None):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            else:
                self.send_header("ETag", f'"{digest(data)}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files, asked
    server.shutdown()
    server.server_close()
