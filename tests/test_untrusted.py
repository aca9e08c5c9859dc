"""Files of somebody else: no code of theirs runs, no file outside of their folder is read, and memory is bounded."""

import ast
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from rollout_files import COMMANDS, HOSTILE, srpo

from srpo_core.formats import read_format
from srpo_core.report import report_rollouts
from srpo_core.report.images import Images
from srpo_core.rollouts import RolloutError, lines, parse_rollout, read_rollouts, record, summarize_files
from srpo_core.rollouts.pictures import _png

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "srpo_core").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")])
PNG = _png(np.zeros((2, 2, 3), np.uint8))


def page_of(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(text.split('id="data">')[1].split("</script>")[0])


# No code


def calls_in(path):
    """The dotted names that a file calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_module_can_run_code_that_a_file_holds():
    """Nothing unpickles, evaluates, or parses YAML; options from YAML come through OmegaConf or transformers."""
    barred_modules = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "xml", "code"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & barred_modules, path
        for name, call in calls_in(path):
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), path
            assert name not in ("torch.load", "np.load", "numpy.load"), path
            assert not any(word.arg == "shell" for word in call.keywords), path


def test_the_rule_against_running_code_sees_it(tmp_path):
    (tmp_path / "a.py").write_text("import os\nx = eval('1')\nos.system('ls')\n")
    assert {name for name, _ in calls_in(tmp_path / "a.py")} == {"eval", "os.system"}


BILLION_LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("text", [BILLION_LAUGHS, "!!python/object/apply:os.system ['touch hacked']", "- &a [*a]"])
def test_yaml_is_no_format_of_tags_and_is_not_parsed(text, tmp_path, monkeypatch):
    """A file for --format holds an example of a response. Whatever else it holds costs an error, and no expansion."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"."):
        read_format(text)
    (tmp_path / "format.yaml").write_text(text)
    result = srpo("doctor", "--format", tmp_path / "format.yaml", code=2 if sys.platform == "win32" else 1)
    assert "Traceback" not in result.output
    assert sorted(os.listdir(tmp_path)) == ["format.yaml"]


def test_every_yaml_file_of_the_project_is_plain_data():
    for path in ROOT.glob("docs/examples/*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)


# The page

FIELDS = ["id", "prompt", "reference", "image", "correct_by", "group", "extra", "tokens", "tags", "open_at_start"]
FIELDS += ["new"]


def line_with(field, text):
    tokens, others = ["<perception>", "a", "</perception>", "<think>", "b", "</think>"], {}
    if field == "tokens":
        tokens = [text, "a"]
    elif field == "tags":
        tokens = [text, "a", f"/{text}"]
        others["tags"] = {"perception": [text, f"/{text}"], "reasoning": ["<r>", "</r>"], "answer": None}
    else:
        others[field] = {text: {text: text}} if field == "extra" else text
    return {"tokens": tokens, "scores": [0.0] * len(tokens), "reward": 1} | others


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_a_rollout_puts_markup_into_the_page_or_controls_onto_the_terminal(field, tmp_path):
    file, is_refused = tmp_path / "rollouts.jsonl", field in ("open_at_start", "new")
    found = [json.dumps(line_with("id", "fine")), *(json.dumps(line_with(field, text)) for text in HOSTILE)]
    file.write_text("\n".join(found) + "\n", encoding="utf-8")
    for name, arguments in COMMANDS.items():
        calls = [["show", file, "--index", at] for at in range(1 if is_refused else len(found))]
        for call in calls if name == "show" else [arguments(file)]:
            result = srpo(*call, code=int(is_refused and name != "show"))
            assert not set(result.output) & {"\x1b", "\x07", "\u202e", "\u2028"}, call
    page, data = page_of(file.with_suffix(".html"))
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "default-src 'none'" in page
    assert len(data["rows"]) == (1 if is_refused else len(found))
    if field in ("id", "prompt", "reference"):
        assert [row[field] for row in data["rows"][1:]] == HOSTILE


@pytest.mark.parametrize("text", HOSTILE)
def test_the_title_is_text(text, tmp_path):
    report_rollouts([parse_rollout('{"tokens": ["a"]}')], tmp_path / "report.html", title=text)
    assert page_of(tmp_path / "report.html")[0].count("<script") == 2


# Paths


@pytest.fixture
def folders(tmp_path):
    """A folder with an image beside the rollout file's, and one inside."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "images", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(PNG)
    (inside / "link.png").symlink_to(outside / "a.png")
    return inside, outside


def test_an_image_outside_of_the_folder_is_not_shown_unless_the_reader_allows_it(folders):
    inside, outside = folders
    paths = ["../outside/a.png", str(outside / "a.png"), "link.png", "images/../../outside/a.png"]
    images = Images([inside], budget=10**6)
    assert images.add("images/a.png", 0) == "images/a.png"
    assert images.add(str(inside / "images/a.png"), 0) is not None  # absolute, and inside
    for path in paths:
        assert images.add(path, 0) is None
    assert "4 were outside of the folder of the rollout file" in images.missing_in_words().replace(" of 6 images", "")
    assert "pass --image-folder" in images.missing_in_words()
    allowed = Images([inside], budget=10**6, allowed=[outside])
    assert all(allowed.add(path, 0) for path in paths)


def test_report_shows_images_of_the_folder_that_is_named(folders):
    inside, outside = folders
    file = inside / "rollouts.jsonl"
    file.write_text(json.dumps({"tokens": ["a"], "image": str(outside / "a.png")}) + "\n")
    result = srpo("report", file, "-o", inside / "report.html")
    assert "outside of the folder of the rollout file" in result.output
    assert page_of(inside / "report.html")[1]["images"] == {}
    srpo("report", file, "-o", inside / "report.html", "--image-folder", outside)
    assert list(page_of(inside / "report.html")[1]["images"]) == [str(outside / "a.png")]


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/stdin", "pipe", "images", "a\0b", "/proc/self/environ", "~/.netrc"]
)
def test_what_is_no_regular_file_is_neither_read_nor_waited_for(path, folders):
    inside, _ = folders
    os.mkfifo(inside / "pipe")
    images = Images([inside], budget=10**6, allowed=[Path("/dev"), Path("/proc")])
    assert images.add(path, 0) is None
    assert images.missing


def test_an_image_of_many_pixels_in_few_bytes_is_not_unpacked(folders):
    """A PNG of 2.5 GB in 13 kB, whose header alone is read."""
    side, content = 30_000, io.BytesIO()

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = zlib.compress(bytes(10**7))
    content.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    (folders[0] / "bomb.png").write_bytes(content.getvalue())
    images = Images([folders[0]], budget=10**6)
    assert images.add("bomb.png", 0) is None
    assert "not readable" in images.missing["bomb.png"]


# Memory and numbers


def deep(levels, inside=""):
    return '{"tokens": ["a"], "extra": {"x": ' + "[" * (levels - 1) + inside + "]" * (levels - 1) + "}}"


@pytest.mark.parametrize("loads", ["orjson", "json"])
def test_what_is_free_in_a_line_is_at_most_100_levels_deep(loads, monkeypatch):
    if loads == "json":
        monkeypatch.setattr(record, "load_json", record.load_with_stdlib)
    assert parse_rollout(deep(100)).text == "a"
    with pytest.raises(RolloutError, match="^extra is nested deeper than 100 levels$"):
        parse_rollout(deep(101))
    for levels in (1010, 100_000):
        with pytest.raises(RolloutError, match="nested"):
            parse_rollout(deep(levels))
    with pytest.raises(RolloutError, match="is NaN, which JSON does not have"):
        parse_rollout(deep(200, "NaN"))


HUGE = [
    ('"reward": 1e400', "reward must be a finite number"),
    ('"reward": 1e308', "reward must be a finite number"),
    ('"advantage": -4e38', "advantage must be a finite number"),
    (f'"reward": {"9" * 400}', "reward must be a finite number"),
    (f'"reward": {"9" * 5000}', "not JSON"),
    (f'"step": {2**63}', "step must be a whole number, at least 0 and below 2^63"),
    (f'"step": {"9" * 30}', "step must be a whole number, at least 0 and below 2^63"),
    (f'"old_log_probs": [-{"9" * 400}]', "old_log_probs[0] is not a finite number"),
]


@pytest.mark.parametrize("loads", ["orjson", "json"])
@pytest.mark.parametrize(("field", "reason"), HUGE, ids=range(len(HUGE)))
def test_a_huge_number_is_named(field, reason, loads, monkeypatch):
    if loads == "json":
        monkeypatch.setattr(record, "load_json", record.load_with_stdlib)
    with pytest.raises(RolloutError) as caught:
        parse_rollout('{"tokens": ["a"], ' + field + "}")
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "line",
    [
        f'{{"tokens": ["a"], "scores": [0], "step": {2**63 - 1}, "group": {"9" * 30}}}',
        '{"tokens": ["a"], "scores": [0], "reward": 3.4e38, "advantage": -3.4e38, "group": 1}',
        deep(100).replace('"extra"', '"scores": [0], "extra"'),
        '{"tokens": ["\\ud800"], "scores": [0], "prompt": "\\udfff", "id": "\\ud800", "reference": "\\ud800"}',
    ],
    ids=["step", "reward", "deep", "half a character"],
)
def test_commands_serve_a_line_at_the_edge_of_what_is_allowed(line, tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text(line + "\n" + '{"tokens": ["a"], "reward": -3.4e38, "group": 1}\n')
    for name, arguments in COMMANDS.items():
        srpo(*(arguments(file) if name != "show" else ["show", file, "--index", 0]))


def test_lines_of_a_file_are_cut_at_the_longest_and_counted_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 40)
    path = tmp_path / "rollouts.jsonl"
    parts = [b'{"text": "a"}\n', b'{"text": "' + b"b" * 100 + b'"}\n', b'{"text": "c"}']
    path.write_bytes(b"".join(parts))
    with path.open("rb") as file:
        found = list(lines.lines_of(file))
    assert [length for _, length in found] == [len(part) for part in parts]
    assert [line for line, _ in found] == [parts[0], parts[1][:41], parts[2]]
    with path.open("rb") as file:
        assert len(list(lines.lines_of(file, end=len(parts[0])))) == 1
    errors = []
    assert [rollout.text for rollout in read_rollouts(path, on_error=errors.append)] == ["a", "c"]
    assert [(error.line, "longer than 40 bytes" in error.reason) for error in errors] == [(2, True)]
    summary = summarize_files([path])
    assert [place.offset for place in summary.places] == [0, len(parts[0]) + len(parts[1])]
    assert (summary.malformed, summary.errors[0].line) == (1, 2)


UNDER_A_LIMIT = """
import resource, sys
from srpo_core.rollouts import RolloutError, read_rollouts, summarize_files
from srpo_core.report import report_files

now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20,) * 2)
path, errors = sys.argv[1], []
texts = [rollout.text for rollout in read_rollouts(path, on_error=errors.append)]
summary = summarize_files([path], workers=1)
print(texts, len(errors), summary.malformed, len(summary))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_endless_line_takes_no_more_memory_than_the_longest_that_is_allowed(tmp_path):
    """Half a gigabyte in one line, read with 400 MB of address space."""
    path = tmp_path / "rollouts.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(32):
            file.write(b"a" * 2**24)
        file.write(b'"}\n{"text": "after"}\n')
    done = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.strip() == "['before', 'after'] 1 1 2"
