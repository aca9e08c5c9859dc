"""The tutorial on a model of Hugging Face runs as printed, with a tiny random model in the place of a checkpoint."""

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from tiny_models import make_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from test_docs import ROOT, fences


def test_the_tutorial_runs_as_printed(tmp_path, monkeypatch):
    model, processor = make_model("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setitem(os.environ, "MODEL", str(tmp_path))
    namespace, printed = {}, io.StringIO()
    blocks = [fence for fence in fences(ROOT / "docs/tutorial/hugging_face.md") if fence.language == "python"]
    assert len(blocks) == 5
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        for fence in blocks:
            exec(compile(fence.code, f"line {fence.line}", "exec"), namespace)
    last = printed.getvalue().splitlines()[-1]
    assert last.startswith("loss ")
    assert last.endswith(", ratio 1.0000")
    # A random model: scores are small, but something depends on the image and on the perception.
    assert namespace["credited"].scores.abs().max() > 1e-4
    assert namespace["batch"].segmentation.broken.tolist() == [0, 0]
    assert namespace["hidden"].shape[:2] == namespace["token_ids"].shape
