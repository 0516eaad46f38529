"""`pull` with the real huggingface_hub client against a small hub on loopback."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint
from hub_server import COMMIT, Hub, git_blob_id, sha256

from autoglm_gguf import CheckpointError, GGUFError, HubError, Progress, convert, hub_client, pull
from autoglm_gguf.cli.main import main
from autoglm_gguf.hub import embedded_checkpoint, resolve_checkpoint, resolve_pair
from autoglm_gguf.hub_cache import is_repo_id

REPO = "zai-org/checkpoint"
OLDER = "0123456789" * 4
"""A commit before `COMMIT`, for tests that publish one."""
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
NEEDED = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
    *SHARDS,
}
UNWANTED = {
    "README.md": b"# a model card",
    "figure.png": b"\x89PNG",
    "pytorch_model.bin": b"pickle",
    "consolidated.00.pth": b"pickle",
    "model.onnx": b"onnx",
    "model-q8_0.gguf": b"GGUF",
    "extra.safetensors": b"named by no index",
    "config.json.bak": b"{}",
    "chat_template.png": b"\x89PNG",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has `REPO`; the client, its cache and our own are this test's alone."""
    import huggingface_hub
    from huggingface_hub import constants

    # Read by the client when it was imported: no telemetry request, no token of this machine.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(hub_client, "RETRY_SECONDS", 0.0)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        server.add(REPO, build_checkpoint(tmp_path / "checkpoint", Shape()), **UNWANTED)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("AUTOGLM_GGUF_CACHE", str(tmp_path / "own"))
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> Path:
    """The directory that was published."""
    return tmp_path / "checkpoint"


def folder(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "models--zai-org--checkpoint"


def blob(tmp_path: Path, hub: Hub, name: str) -> Path:
    return folder(tmp_path) / "blobs" / hub.repos[REPO].etag(name)


def partial(tmp_path: Path, hub: Hub, name: str) -> Path:
    path = blob(tmp_path, hub, name)
    return path.with_name(path.name + ".incomplete")


def size(hub: Hub, name: str) -> int:
    return len(hub.repos[REPO].files[name])


def ranges(hub: Hub) -> list[str]:
    found = [r.headers["range"] for r in hub.requests if "range" in r.headers]
    return list(dict.fromkeys(found))  # a redirect repeats it


# --- what is brought ---


def test_pull_brings_only_what_a_conversion_reads(hub: Hub, source: Path) -> None:
    snapshot = pull(REPO)
    assert {path.name for path in snapshot.iterdir()} == NEEDED
    for name in NEEDED:
        assert (snapshot / name).read_bytes() == (source / name).read_bytes(), name
    assert hub.fetched() == NEEDED
    assert hub.sent == {name: size(hub, name) for name in NEEDED}


def test_pull_names_files_as_the_hub_does(hub: Hub, tmp_path: Path) -> None:
    snapshot = pull(REPO, cache_dir=tmp_path / "other")
    assert snapshot == tmp_path / "other" / "models--zai-org--checkpoint" / "snapshots" / COMMIT
    content = (snapshot / "config.json").read_bytes()
    assert (snapshot / "config.json").resolve().name == git_blob_id(content)
    weights = (snapshot / SHARDS[0]).read_bytes()
    assert (snapshot / SHARDS[0]).resolve().name == sha256(weights)


def test_pull_takes_the_single_file_when_there_is_no_index(hub: Hub) -> None:
    files = hub.repos[REPO].files
    files["model.safetensors"] = files.pop(SHARDS[0])
    del files[INDEX]
    names = {path.name for path in pull(REPO).iterdir()}
    assert names == NEEDED - {INDEX, *SHARDS} | {"model.safetensors"}


def test_pull_takes_a_revision_and_remembers_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repos[REPO].revisions |= {"refs/pr/1": OLDER, OLDER: OLDER}
    snapshot = pull(REPO, revision="refs/pr/1")
    assert snapshot.name == OLDER
    assert (folder(tmp_path) / "refs/refs/pr/1").read_text() == OLDER
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(REPO, revision="refs/pr/1") == pull(REPO, revision=OLDER) == snapshot
    with pytest.raises(HubError, match="not whole in the cache"):
        pull(REPO)


def test_clients_own_files_and_ours_are_the_same_cache(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    cache = tmp_path / "hf"
    for name in NEEDED - {SHARDS[1]}:
        hf_hub_download(REPO, name, cache_dir=cache, endpoint=hub.endpoint)
    hub.forget_traffic()
    pull(REPO)
    assert hub.fetched() == {SHARDS[1]}
    found = hf_hub_download(REPO, SHARDS[1], cache_dir=cache, local_files_only=True)
    assert Path(found) == folder(tmp_path) / "snapshots" / COMMIT / SHARDS[1]


def test_second_pull_downloads_nothing_and_hashes_nothing(hub: Hub, tmp_path: Path) -> None:
    pull(REPO)
    path = blob(tmp_path, hub, SHARDS[0])
    facts = path.stat()
    path.write_bytes(bytes(facts.st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as if it had not changed
    hub.forget_traffic()
    reports: list[Progress] = []
    pull(REPO, on_progress=reports.append)
    assert hub.fetched() == set()
    assert reports == []


def test_two_pulls_at_once_fetch_once(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.hold_at[SHARDS[0]] = 1000
    threads = [threading.Thread(target=pull, args=(REPO,)) for _ in range(2)]
    threads[0].start()
    assert hub.holding.wait(20)
    threads[1].start()
    while "waiting for it" not in caplog.text:
        threads[1].join(0.02)
        assert threads[1].is_alive()
    hub.release.set()
    for thread in threads:
        thread.join(20)
    assert hub.sent == {name: size(hub, name) for name in NEEDED}


# --- interrupted ---


@pytest.mark.parametrize("reset", [False, True])
def test_pull_resumes_when_the_connection_breaks(hub: Hub, source: Path, reset: bool) -> None:
    hub.reset = reset
    half = size(hub, SHARDS[1]) // 2
    hub.cut_at = {SHARDS[1]: half, "config.json": 10}
    snapshot = pull(REPO)
    assert ranges(hub) == ["bytes=10-", f"bytes={half}-"]
    assert hub.sent == {name: size(hub, name) for name in NEEDED}, "no byte was sent twice"
    for name in NEEDED:
        assert (snapshot / name).read_bytes() == (source / name).read_bytes(), name


def test_pull_starts_a_file_again_when_the_server_knows_no_ranges(hub: Hub, source: Path) -> None:
    hub.ignore_ranges = True
    hub.cut_at = {SHARDS[0]: 1000}
    assert (pull(REPO) / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()
    assert hub.sent[SHARDS[0]] == 1000 + size(hub, SHARDS[0])


def test_interrupted_pull_is_continued_by_the_next(hub: Hub, tmp_path: Path) -> None:
    hub.hold_at[SHARDS[1]] = 5000

    def interrupt(progress: Progress) -> None:
        part = partial(tmp_path, hub, SHARDS[1])
        if progress.file == SHARDS[1] and part.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(REPO, on_progress=interrupt)
    kept = partial(tmp_path, hub, SHARDS[1]).stat().st_size
    assert 0 < kept <= 5000
    assert not blob(tmp_path, hub, SHARDS[1]).exists()
    assert not (folder(tmp_path) / "snapshots" / COMMIT / SHARDS[1]).exists()
    assert not (folder(tmp_path) / "refs/main").exists(), "not whole: no offline use"
    hub.forget_traffic()
    pull(REPO)
    assert hub.sent == {SHARDS[1]: size(hub, SHARDS[1]) - kept}
    assert ranges(hub) == [f"bytes={kept}-"]


@pytest.mark.skipif(os.name != "posix", reason="SIGINT of POSIX")
def test_ctrl_c_in_the_middle_leaves_a_part_that_the_next_pull_uses(
    hub: Hub, tmp_path: Path
) -> None:
    hub.hold_at[SHARDS[1]] = 5000
    command = [sys.executable, "-m", "autoglm_gguf", "pull", REPO]
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert hub.holding.wait(60)
            part = partial(tmp_path, hub, SHARDS[1])
            while not (part.exists() and part.stat().st_size == 5000):
                assert process.poll() is None
                threading.Event().wait(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert "goes on from there" in err and "Traceback" not in err
    assert part.stat().st_size == 5000
    assert not blob(tmp_path, hub, SHARDS[1]).exists()
    hub.forget_traffic()
    pull(REPO)
    assert hub.sent == {SHARDS[1]: size(hub, SHARDS[1]) - 5000}


def test_pull_gives_up_and_keeps_the_part_when_the_hub_goes_away(hub: Hub, tmp_path: Path) -> None:
    hub.cut_at[SHARDS[0]] = 3000

    def go_away(progress: Progress) -> None:
        if progress.file == SHARDS[0]:
            hub.status = 503

    with pytest.raises(HubError, match=r"stopped at 3\.00 kB of .*HTTP 503") as caught:
        pull(REPO, on_progress=go_away)
    assert caught.value.unreachable
    assert "autoglm-gguf pull zai-org/checkpoint" in caught.value.hint
    assert partial(tmp_path, hub, SHARDS[0]).stat().st_size == 3000
    hub.status = 200
    hub.forget_traffic()
    pull(REPO)
    assert hub.sent[SHARDS[0]] == size(hub, SHARDS[0]) - 3000


def test_part_that_is_too_long_is_begun_again(hub: Hub, source: Path, tmp_path: Path) -> None:
    part = partial(tmp_path, hub, SHARDS[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(size(hub, SHARDS[0]) + 1))
    assert (pull(REPO) / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()


def test_progress_counts_all_files_and_what_an_earlier_run_brought(
    hub: Hub, tmp_path: Path
) -> None:
    part = partial(tmp_path, hub, SHARDS[1])
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.repos[REPO].files[SHARDS[1]][:7000])
    reports: list[Progress] = []
    pull(REPO, on_progress=reports.append)
    total = sum(size(hub, name) for name in NEEDED)
    assert {report.total_bytes for report in reports} == {total}
    done = [report.done_bytes for report in reports]
    assert done == sorted(done) and done[-1] == total
    assert {report.resumed_bytes for report in reports} == {size(hub, INDEX) + 7000}
    assert {report.file for report in reports} == NEEDED - {INDEX}


def test_seconds_left_counts_only_what_this_run_did() -> None:
    assert Progress("f", 600, 1000, 2.0, resumed_bytes=500).seconds_left == 8.0
    assert Progress("f", 500, 1000, 2.0, resumed_bytes=500).seconds_left == 0.0


# --- damaged ---


@pytest.mark.parametrize("name", [SHARDS[0], "config.json", "tokenizer.json", INDEX])
def test_file_damaged_on_the_way_is_reported_and_gone(
    hub: Hub, source: Path, tmp_path: Path, name: str
) -> None:
    right = hub.repos[REPO].files[name]
    hub.tamper[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(HubError, match=f"{name}: damaged on the way") as caught:
        pull(REPO)
    assert caught.value.hint == "run again: autoglm-gguf pull zai-org/checkpoint"
    assert not blob(tmp_path, hub, name).exists()
    assert not partial(tmp_path, hub, name).exists()
    hub.tamper.clear()
    assert (pull(REPO) / name).read_bytes() == (source / name).read_bytes()


def test_file_longer_than_listed_is_damaged(hub: Hub, tmp_path: Path) -> None:
    hub.tamper[SHARDS[0]] = hub.repos[REPO].files[SHARDS[0]] + b"more"
    with pytest.raises(HubError, match="damaged on the way"):
        pull(REPO)
    assert not partial(tmp_path, hub, SHARDS[0]).exists()


def test_file_shorter_than_listed_is_no_success(hub: Hub, tmp_path: Path) -> None:
    hub.tamper[SHARDS[0]] = hub.repos[REPO].files[SHARDS[0]][:-1]
    with pytest.raises(HubError, match=f"{SHARDS[0]}"):
        pull(REPO)
    assert not blob(tmp_path, hub, SHARDS[0]).exists()


@pytest.mark.parametrize("network", [True, False])
def test_files_damaged_in_the_cache_are_reported_and_gone(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool
) -> None:
    snapshot = pull(REPO)
    for name in (SHARDS[1], "config.json"):
        with blob(tmp_path, hub, name).open("r+b") as file:
            file.seek(8)
            file.write(b"\xff")
    if not network:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=f"config.json, {SHARDS[1]}: damaged in") as caught:
        pull(REPO)
    assert caught.value.hint == "run again: autoglm-gguf pull zai-org/checkpoint"
    for name in (SHARDS[1], "config.json"):
        assert not blob(tmp_path, hub, name).exists()
        assert not (snapshot / name).is_symlink()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.forget_traffic()
    pull(REPO)
    assert hub.fetched() == {SHARDS[1], "config.json"}
    assert (snapshot / SHARDS[1]).read_bytes() == (source / SHARDS[1]).read_bytes()


def test_file_cut_short_in_the_cache_is_reported(hub: Hub, tmp_path: Path) -> None:
    pull(REPO)
    os.truncate(blob(tmp_path, hub, SHARDS[0]), 100)
    with pytest.raises(HubError, match=f"{SHARDS[0]}: damaged in"):
        pull(REPO)


def test_changed_file_is_checked_again_and_passes_when_it_is_right(
    hub: Hub, tmp_path: Path
) -> None:
    pull(REPO)
    os.utime(blob(tmp_path, hub, SHARDS[0]), ns=(1, 1))
    hub.forget_traffic()
    reports: list[Progress] = []
    pull(REPO, on_progress=reports.append)
    assert hub.fetched() == set()
    assert [report.file for report in reports] == [f"checking {SHARDS[0]}"]
    assert reports[-1].done_bytes == reports[-1].total_bytes == size(hub, SHARDS[0])
    pull(REPO, on_progress=reports.append)
    assert len(reports) == 1


def test_broken_record_of_what_was_verified_costs_time_only(hub: Hub, tmp_path: Path) -> None:
    pull(REPO)
    [record] = (tmp_path / "own" / "verified").iterdir()
    record.write_text("[")
    hub.forget_traffic()
    pull(REPO)
    assert hub.fetched() == set()
    assert len(json.loads(record.read_text())) == len(NEEDED)


# --- offline ---


def test_offline_pull_uses_the_cache_and_asks_nobody(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = pull(REPO)
    hub.forget_traffic()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reports: list[Progress] = []
    assert pull(REPO, on_progress=reports.append) == snapshot
    assert hub.requests == [] and reports == []


@pytest.mark.parametrize("trouble", ["down", "busy", "login page"])
def test_pull_uses_the_cache_with_a_note_when_the_hub_does_not_answer(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    snapshot = pull(REPO)
    if trouble == "down":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    else:
        hub.status, hub.page = (503, "") if trouble == "busy" else (200, "<html>log in</html>")
    with caplog.at_level(logging.WARNING, "autoglm_gguf.hub"):
        assert pull(REPO) == snapshot
    assert f"using the copy in the cache, commit {COMMIT[:12]}" in caplog.text


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[0]])
def test_incomplete_cache_is_no_use_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (pull(REPO) / name).resolve().unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="not whole in the cache") as caught:
        pull(REPO)
    assert caught.value.hint == f"without HF_HUB_OFFLINE: autoglm-gguf pull {REPO}"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached") as caught:
        pull(REPO)
    assert caught.value.unreachable and "HF_ENDPOINT" in caught.value.hint


def test_offline_pull_without_any_cache_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="not whole in the cache"):
        pull(REPO)
    assert hub.requests == []


def test_offline_pull_of_blobs_in_the_clients_shared_store(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """huggingface_hub 2 may keep a blob as a link to a file named by its Xet hash."""
    snapshot = pull(REPO)
    path = blob(tmp_path, hub, SHARDS[0])
    store = tmp_path / "hf" / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    path.rename(store)
    path.symlink_to(os.path.relpath(store, path.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(REPO) == snapshot
    store.write_bytes(bytes(store.stat().st_size))
    with pytest.raises(HubError, match=f"{SHARDS[0]}: damaged in"):
        pull(REPO)
    assert not store.exists() and not path.is_symlink()


# --- refused ---


def test_missing_repo_is_named_with_the_place_asked(hub: Hub) -> None:
    with pytest.raises(HubError, match=f"zai-org/none: no such repo on {hub.endpoint}") as caught:
        pull("zai-org/none")
    assert not caught.value.unreachable
    assert "hf auth login" in caught.value.hint


def test_missing_repo_is_not_looked_for_in_the_cache(hub: Hub) -> None:
    pull(REPO)
    del hub.repos[REPO]
    with pytest.raises(HubError, match="no such repo"):
        pull(REPO)


def test_gated_repo_says_where_to_ask(hub: Hub) -> None:
    hub.repos[REPO].gated = True
    with pytest.raises(HubError, match="gated") as caught:
        pull(REPO)
    assert f"{hub.endpoint}/{REPO}" in caught.value.hint


def test_missing_revision_is_named(hub: Hub) -> None:
    with pytest.raises(HubError, match="no revision 'v9'") as caught:
        pull(REPO, revision="v9")
    assert f"{hub.endpoint}/{REPO}" in caught.value.hint


@pytest.mark.parametrize("status", [401, 403])
def test_refused_token_says_to_log_in(hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(HubError, match=f"refuses access .HTTP {status}") as caught:
        pull(REPO)
    assert "hf auth login" in caught.value.hint


def test_answer_that_is_no_hubs_is_told(hub: Hub) -> None:
    hub.page = "<html>please log in</html>"
    with pytest.raises(HubError, match="not what a hub answers") as caught:
        pull(REPO)
    assert "proxy or login page" in caught.value.hint


def test_repo_without_safetensors_names_what_it_has(hub: Hub) -> None:
    files = hub.repos[REPO].files
    for name in (INDEX, *SHARDS):
        del files[name]
    with pytest.raises(HubError, match=r"lacks model\.safetensors") as caught:
        pull(REPO)
    assert "consolidated.00.pth, model-q8_0.gguf, model.onnx" in caught.value.message
    assert hub.fetched() == set()


def test_repo_without_a_config_is_no_checkpoint(hub: Hub) -> None:
    del hub.repos[REPO].files["config.json"]
    with pytest.raises(HubError, match=r"no config\.json"):
        pull(REPO)


def test_index_that_names_a_shard_the_repo_lacks_is_told(hub: Hub) -> None:
    del hub.repos[REPO].files[SHARDS[1]]
    with pytest.raises(HubError, match=f"lacks {SHARDS[1]}"):
        pull(REPO)


@pytest.mark.parametrize("shard", ["../../escaped", "/etc/passwd", "", ".", "a\\b", 7, ["x"], None])
def test_index_that_points_outside_is_refused(hub: Hub, shard: object) -> None:
    hub.repos[REPO].files[INDEX] = json.dumps({"weight_map": {"x": shard}}).encode()
    with pytest.raises(CheckpointError, match="weight_map"):
        pull(REPO)


def test_listing_with_a_path_for_a_commit_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO].revisions["main"] = "../../../escaped"
    with pytest.raises(HubError, match="commit or a digest that is none"):
        pull(REPO)
    assert not (tmp_path / "hf").exists()


def test_disk_that_is_too_small_is_told_before_anything_large_is_fetched(hub: Hub) -> None:
    hub.claim[SHARDS[1]] = 10**18
    with pytest.raises(HubError, match=r"disk too small .* free, needs 1000000000\.") as caught:
        pull(REPO)
    assert hub.fetched() == {INDEX}
    assert "HF_HUB_CACHE" in caught.value.hint


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_cache_that_cannot_be_made_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file in the way")
    with pytest.raises(HubError, match="cannot be read or written") as caught:
        pull(REPO)
    assert "HF_HUB_CACHE" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zai-org/AutoGLM-Phone-9B", True),
        ("a/b.c_d", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a", False),
        ("a/", False),
        ("C:\\a/b", False),
        ("a/b..c", False),
        ("a--b/c", False),
        ("a/" + "b" * 95, False),
        ("模型/b", False),
    ],
)
def test_repo_id_has_an_owner_and_a_name(text: str, expected: bool) -> None:
    assert is_repo_id(text) is expected


@pytest.mark.parametrize(
    ("repo_id", "revision"), [("not a repo", None), (REPO, "../../escaped"), (REPO, "/etc/x")]
)
def test_wrong_arguments_are_value_errors(hub: Hub, repo_id: str, revision: str | None) -> None:
    with pytest.raises(ValueError, match="not "):
        pull(repo_id, revision=revision)
    assert hub.requests == []


def test_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    pull(REPO)
    tokens = {
        (request.path.startswith("/cdn/"), request.headers.get("authorization"))
        for request in hub.requests
    }
    assert tokens == {(False, "Bearer hf_test"), (True, None)}


# --- where a checkpoint or a model is named ---


def test_resolve_checkpoint_prefers_the_directory_here(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(REPO) == Path(REPO)
    assert hub.requests == []


def test_resolve_checkpoint_knows_the_embedded_one_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("autoglm-tiny") == embedded_checkpoint()
    (tmp_path / "autoglm-tiny").mkdir()
    assert resolve_checkpoint("autoglm-tiny") == Path("autoglm-tiny"), "a directory here goes first"


def test_resolve_checkpoint_names_both_ways_when_it_is_neither(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        resolve_checkpoint(tmp_path / "nowhere")
    assert "zai-org/AutoGLM-Phone-9B" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file, not a directory"):
        resolve_checkpoint(tmp_path / "file")


def test_model_that_is_a_repo_id_says_to_convert_it() -> None:
    with pytest.raises(GGUFError) as caught:
        resolve_pair("zai-org/AutoGLM-Phone-9B")
    assert "autoglm-gguf convert zai-org/AutoGLM-Phone-9B" in caught.value.hint
    with pytest.raises(GGUFError) as caught:
        resolve_pair("models/m.gguf")
    assert "models/m.gguf" not in caught.value.hint


@pytest.mark.native
def test_convert_of_a_repo_gives_the_bytes_of_the_directorys_conversion(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    here = convert(source, tmp_path / "here", "q4_0")
    pulled = convert(REPO, tmp_path / "pulled", "q4_0")
    assert here.mmproj is not None and pulled.mmproj is not None
    for one, other in ((here.text, pulled.text), (here.mmproj, pulled.mmproj)):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def asked(hub: Hub) -> set[str]:
    """The commits whose files were asked for by address."""
    paths = [request.path for request in hub.requests if "/resolve/" in request.path]
    return {path.split("/resolve/")[1].split("/")[0] for path in paths}


@pytest.mark.native
def test_convert_takes_a_revision_of_a_repo(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO].revisions |= {"v0.1": OLDER, OLDER: OLDER}
    pair = convert(REPO, tmp_path / "out", revision="v0.1")
    assert pair.text.name == "checkpoint-Q8_0.gguf"
    assert asked(hub) == {OLDER}
    assert (folder(tmp_path) / "refs" / "v0.1").read_text() == OLDER
    assert not (folder(tmp_path) / "refs" / "main").exists()


def test_convert_of_a_missing_revision_names_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no revision 'v9'"):
        convert(REPO, tmp_path / "out", revision="v9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("revision", ["main", ""])
def test_revision_of_a_directory_here_is_refused(
    hub: Hub, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    with pytest.raises(ValueError, match=rf"revision '{revision}': .*is a directory here"):
        convert(source, tmp_path / "out", revision=revision)
    source.rename(tmp_path / "copy")
    (tmp_path / "zai-org").mkdir()
    (tmp_path / "copy").rename(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a directory here"):  # the directory wins
        resolve_checkpoint(REPO, revision=revision)
    assert hub.requests == []


def test_convert_of_what_is_no_revision_is_a_value_error(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the name of a branch"):
        convert(REPO, tmp_path / "out", revision="../../escaped")
    assert hub.requests == []


# --- command line ---


@pytest.mark.native
def test_convert_command_takes_a_revision(
    hub: Hub, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[REPO].revisions |= {"v0.1": OLDER, OLDER: OLDER}
    out = str(tmp_path / "out")
    assert main(["convert", REPO, "--revision", "v0.1", "--outdir", out]) == 0
    assert asked(hub) == {OLDER}
    assert main(["convert", str(source), "--revision", "v0.1", "--outdir", out]) == 2
    assert "is a directory here" in capsys.readouterr().err


def test_verify_command_asks_for_the_revision(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").touch()
    assert main(["verify", REPO, str(tmp_path / "m.gguf"), "--revision", "v9"]) == 1
    assert "no revision 'v9'" in capsys.readouterr().err


def test_pull_command_prints_the_directory(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPO]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{folder(tmp_path) / 'snapshots' / COMMIT}\n"
    assert "100%" in printed.err
    assert f"{len(NEEDED)} files" in printed.err


def test_pull_command_prints_json(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", REPO, "--revision", COMMIT, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["commit"] == COMMIT
    assert Path(result["path"]).name == COMMIT
    assert result["files"] == {name: {"n_bytes": size(hub, name)} for name in NEEDED}


@pytest.mark.native
def test_convert_command_pulls_a_repo_first(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", REPO, "--outdir", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    files = json.loads(printed.out)["files"]
    assert Path(files["text"]["path"]).name == "checkpoint-Q8_0.gguf"
    assert printed.err.count("100%") >= 2, "one bar for the download, one for the conversion"


def test_pull_command_reports_errors_with_a_hint(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "zai-org/none"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: zai-org/none: no such repo") and second.startswith("hint: ")
    assert main(["pull", "nonsense"]) == 2
