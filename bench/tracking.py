"""What logging costs a training step, with MLflow up and down: at most 1 % is the aim.

    python bench/tracking.py [steps]

A real small training step (a two-layer OLMoE, 8 x 128 tokens) logs six numbers through `Output.metric`, as a warm-up
does, while a `Sender` takes the journal to a real MLflow server. Reported per step, as a share of the step without
logging: the time that the training loop itself spends in logging, and the CPU time of the threads beside it, which
share the interpreter with it (their start, the import of mlflow above all, is shown apart: it is paid once).
CPU times, because they hold on a busy machine, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

NUMBERS = ("loss", "loss/cross_entropy", "loss/quality", "good_ratio/pool", "good_ratio/corrupted", "learning_rate")


def training_step() -> Callable[[], None]:
    """A function that does one step."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
    )
    model = OlmoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 4096, (8, 128))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()

    return step


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real server on SQLite; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "mlflow.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | quiet, cwd=folder, start_new_session=True
        )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def measure(step: Callable[[], None], steps: int, uri: str) -> dict[str, float]:
    """Milliseconds per step: of training, inside logging, and of the threads beside."""
    from selectmoe import sending, stage
    from selectmoe.config import StageConfig

    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ[sending.PATIENCE] = "0"
    logging, training = [], []
    with tempfile.TemporaryDirectory() as folder, sending.sending(f"{folder}/work"):
        config = StageConfig(output_dir=f"{folder}/out", work_root=f"{folder}/work")
        with stage.begin("warmup", 1, config) as out:
            started = time.process_time() - time.thread_time()
            waited = time.monotonic()
            while "mlflow" not in sys.modules or time.monotonic() - waited < 10:  # the import, and the first sending
                step()
            start_up = time.process_time() - time.thread_time() - started
            beside = time.process_time() - time.thread_time()
            for at in range(steps):
                a = time.thread_time()
                step()
                b = time.thread_time()
                for name in NUMBERS:
                    out.metric(name, 1.0 / (at + 1), step=at)
                c = time.thread_time()
                training.append(b - a)
                logging.append(c - b)
            beside = time.process_time() - time.thread_time() - beside
            out.commit()
    return {
        "step": 1e3 * statistics.median(training),
        "logging": 1e3 * statistics.mean(logging),
        "beside": 1e3 * beside / steps,
        "start_up": start_up,
    }


def main(steps: int) -> None:
    """Measure and print a table."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    step = training_step()
    with tempfile.TemporaryDirectory() as folder:
        with mlflow_server(Path(folder)) as uri:
            rows = {"up": measure(step, steps, uri)}
        rows["down"] = measure(step, steps, uri)
    print(f"{'MLflow':<8} {'step ms':>8} {'in the loop':>12} {'beside':>8} {'once, s':>8}")
    for name, r in rows.items():
        shares = [f"{100 * r[key] / r['step']:.2f} %" for key in ("logging", "beside")]
        print(f"{name:<8} {r['step']:>8.1f} {shares[0]:>12} {shares[1]:>8} {r['start_up']:>8.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
