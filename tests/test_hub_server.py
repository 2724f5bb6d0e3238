"""The loopback Hub against the unmodified huggingface_hub client, each client in a clean process with a fresh cache.

Expectations come from the protocol (git's blob id, SHA-256, RFC 9110 ranges) and from the bytes that went in.
"""

import functools
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import ALICE, HubServer, front_matter, is_text
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import load_file
from tiny import image_processor, unit_model, vision_config

from training.export import save_encoder

# the client itself uploads by httpx2's older argument
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: apache-2.0\npipeline_tag: image-feature-extraction\ntags: [unit]\n---\n# A model\n"
PUSH = """
api.create_repo("alice/model", exist_ok=True)
info = api.upload_folder(repo_id="alice/model", folder_path=argv[0], commit_message="Publish")
answer = info.oid
"""
IN_A_PROCESS = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
api, argv = HfApi(), sys.argv[1:]
"""


def attempt(function, *given, **named):
    """Class, status and words of what a call raises."""
    try:
        return ["returned", 0, str(function(*given, **named))]
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", 0), str(error)]


def ask(hub, code, *argv, token=ALICE, home=None):
    """What a client leaves in `answer`: with a cache of its own, `home` or a fresh one, that is thrown away.

    It runs in this process, through the arguments that the client has for endpoint, token and cache.
    """
    with tempfile.TemporaryDirectory() as fresh:
        api = HfApi(endpoint=hub.endpoint, token=token)
        there = {"cache_dir": home or fresh}
        scope = {
            "api": api,
            "argv": [str(one) for one in argv],
            "attempt": attempt,
            "CommitOperationAdd": CommitOperationAdd,
            "RepoFile": RepoFile,
            "hashlib": hashlib,
            "pathlib": pathlib,
            "hf_hub_download": functools.partial(api.hf_hub_download, **there),
            "snapshot_download": functools.partial(api.snapshot_download, **there),
        }
        exec(compile(code, "the client's code", "exec"), scope)
        return scope["answer"]


def process(hub, code, *argv, **options):
    """The same in a clean process, which finds the server by its environment alone."""
    result = hub.python(f"{IN_A_PROCESS}{code}\nprint(json.dumps(answer))", *argv, **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that are not text, the same each time."""
    block = b"".join(hashlib.sha256(b"%d %d" % (seed, n)).digest() for n in range(size // 32 + 1))
    return b"\xff" + block[: size - 1]


@pytest.fixture
def folder(tmp_path):
    """A model to upload: text, a card, a picture in a folder of its own, and weights in several parts."""
    made = tmp_path / "model"
    (made / "figures").mkdir(parents=True)
    (made / "config.json").write_text('{"hidden_size": 8}')
    (made / "README.md").write_text(CARD)
    (made / "figures" / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n" + noise(500))
    (made / "model.safetensors").write_bytes(noise(200_000, 1))
    return made


@pytest.fixture
def hub(hub, monkeypatch):
    """Parts of 64 kB, so that the weights take four; and the settings that `HubServer.environment` gives a process."""
    hub.part_size = 64_000
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", {})  # or it asks huggingface.co
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_folder_goes_up_in_one_commit_and_comes_back_whole(hub, folder, tmp_path):
    first = len(hub.requests)
    sha = process(hub, PUSH, folder)
    assert hub.head("alice/model") == sha
    assert hub.calls(first)["POST", "/api/{kind}/{repo}/commit/{rev}"] == 1
    assert hub.calls(first)["PUT", "/_storage/parts/{kind}/{repo}/{oid}/{number}"] == 4
    assert hub.calls(first)["PUT", "/_storage/objects/{kind}/{repo}/{oid}"] == 1  # the picture
    assert {path: data for path, data in hub.files("alice/model").items() if path != ".gitattributes"} == contents(
        folder
    )
    found = process(
        hub,
        """
at = snapshot_download("alice/model", local_dir=argv[0])
info = api.model_info("alice/model", files_metadata=True)
files = {f.rfilename: [f.size, f.blob_id, f.lfs.sha256 if f.lfs else None] for f in info.siblings}
commits = [[c.commit_id, c.title, c.authors] for c in api.list_repo_commits("alice/model")]
answer = [info.sha, info.pipeline_tag, info.tags, info.card_data.license, files, commits]
""",
        tmp_path / "back",
        token=None,
    )
    assert found[:4] == [sha, "image-feature-extraction", ["unit"], "apache-2.0"]
    weights = (folder / "model.safetensors").read_bytes()
    assert found[4]["model.safetensors"][::2] == [len(weights), hashlib.sha256(weights).hexdigest()]
    data = (folder / "config.json").read_bytes()
    git = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True).stdout
    assert found[4]["config.json"] == [len(data), git.decode().strip(), None]
    assert [entry[1:] for entry in found[5]] == [["Publish", ["alice"]], ["initial commit", ["alice"]]]
    back = {
        path: data for path, data in contents(tmp_path / "back").items() if not path.startswith((".cache", ".gita"))
    }
    assert back == contents(folder)
    assert not hub.uncovered
    assert not hub.leaks()
    storage = [one for one in hub.requests if one.route.startswith("/_storage/")]
    assert storage
    assert all(one.header("Host") == f"localhost:{hub.port}" for one in storage)
    assert all(one.header("Authorization") is None for one in storage)


def test_a_second_push_of_the_same_folder_sends_nothing(hub, folder):
    sha = ask(hub, PUSH, folder)
    first = len(hub.requests)
    assert ask(hub, PUSH, folder) == sha
    assert not [one for one in hub.requests[first:] if one.method == "PUT" or "/commit/" in one.route]
    (folder / "config.json").write_text('{"hidden_size": 9}')
    first = len(hub.requests)
    changed = ask(hub, PUSH, folder)
    assert hub.head("alice/model") == changed != sha
    assert not [one for one in hub.requests[first:] if one.method == "PUT"]
    assert hub.files("alice/model", sha)["config.json"] == b'{"hidden_size": 8}'


def test_a_large_file_known_under_another_name_is_not_sent_again(hub, folder):
    ask(hub, PUSH, folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    first = len(hub.requests)
    ask(hub, PUSH, folder)
    assert not [one for one in hub.requests[first:] if one.method == "PUT"]
    assert hub.files("alice/model")["weights.safetensors"] == (folder / "weights.safetensors").read_bytes()


def test_a_second_download_transfers_no_file(hub, folder, tmp_path):
    ask(hub, PUSH, folder)
    code = """
paths = [hf_hub_download("alice/model", name) for name in ("config.json", "model.safetensors")]
answer = [pathlib.Path(path).resolve().name for path in paths]
"""
    blobs = ask(hub, code, home=tmp_path / "home")
    weights = (folder / "model.safetensors").read_bytes()
    assert blobs[1] == hashlib.sha256(weights).hexdigest()
    first = len(hub.requests)
    assert ask(hub, code, home=tmp_path / "home") == blobs
    assert {one.method for one in hub.requests[first:]} == {"HEAD"}
    assert sum(one.sent for one in hub.requests[first:]) == 0


def test_revisions_branches_and_tags(hub):
    found = ask(
        hub,
        """
api.create_repo("alice/model")
def put(text, **given):
    return api.upload_file(path_or_fileobj=text, path_in_repo="a.txt", repo_id="alice/model", **given).oid
def get(revision):
    return pathlib.Path(hf_hub_download("alice/model", "a.txt", revision=revision)).read_text()
first, second = put(b"one"), put(b"two")
api.create_tag("alice/model", tag="v1", revision=first)
api.create_branch("alice/model", branch="dev/next", revision=first)
third = put(b"three", revision="dev/next")
refs = api.list_repo_refs("alice/model")
answer = {
    "read": [get(name) for name in (first, second, "main", "v1", "dev/next", third[:8])],
    "refs": {ref.ref: ref.target_commit for ref in refs.branches + refs.tags},
    "commits": [first, second, third],
    "exists": [
        attempt(api.create_branch, "alice/model", branch="dev/next"),
        attempt(api.create_tag, "alice/model", tag="v1"),
    ],
    "missing": attempt(get, "v2"),
    "parent": attempt(put, b"four", parent_commit=first),
    "commit": attempt(put, b"four", revision="nowhere"),
}
api.create_branch("alice/model", branch="dev/next", exist_ok=True)
api.delete_tag("alice/model", tag="v1")
api.delete_branch("alice/model", branch="dev/next")
refs = api.list_repo_refs("alice/model")
answer["after"] = [ref.ref for ref in refs.branches + refs.tags]
""",
    )
    first, second, third = found["commits"]
    assert found["read"] == ["one", "two", "two", "one", "three", "three"]
    assert found["refs"] == {"refs/heads/main": second, "refs/heads/dev/next": third, "refs/tags/v1": first}
    assert [one[1] for one in found["exists"]] == [409, 409]
    assert found["missing"][:2] == ["RevisionNotFoundError", 404]
    assert found["commit"][:2] == ["RevisionNotFoundError", 404]
    assert found["parent"][1] == 412
    assert hub.head("alice/model") == second
    assert found["after"] == ["refs/heads/main"]


def test_deleting_files_and_folders(hub, folder):
    ask(hub, PUSH, folder)
    found = ask(
        hub,
        """
api.delete_file("config.json", "alice/model")
api.delete_folder("figures", "alice/model")
only = {"allow_patterns": "README.md", "delete_patterns": "*.safetensors"}
api.upload_folder(repo_id="alice/model", folder_path=argv[0], **only)
answer = [api.list_repo_files("alice/model"), attempt(api.delete_file, "nothing.txt", "alice/model")]
""",
        folder,
    )
    assert found[0] == [".gitattributes", "README.md"]
    assert found[1][:2] == ["RemoteEntryNotFoundError", 404]


def test_the_tree_is_listed_page_by_page(hub):
    hub.page_size = 3
    found = ask(
        hub,
        """
api.create_repo("alice/model")
names = [f"{folder}/{n}.txt" for folder in "ab" for n in range(4)] + ["top.txt"]
api.create_commit("alice/model", [CommitOperationAdd(name, b"x") for name in names], commit_message="many")
answer = {
    "all": [f.path for f in api.list_repo_tree("alice/model", recursive=True) if isinstance(f, RepoFile)],
    "top": [f.path for f in api.list_repo_tree("alice/model")],
    "a": [f.path for f in api.list_repo_tree("alice/model", "a", expand=True)],
    "some": [f.path for f in api.get_paths_info("alice/model", ["top.txt", "b", "none"])],
    "none": attempt(lambda: list(api.list_repo_tree("alice/model", "c"))),
}
""",
    )
    inside = [f"{folder}/{n}.txt" for folder in "ab" for n in range(4)]
    assert found["all"] == [".gitattributes", *inside, "top.txt"]
    assert found["top"] == [".gitattributes", "a", "b", "top.txt"]
    assert found["a"] == inside[:4]
    assert found["some"] == ["top.txt", "b"]
    assert found["none"][:2] == ["RemoteEntryNotFoundError", 404]


def test_a_pull_request_leaves_main_alone_until_it_is_merged(hub, folder):
    ask(hub, PUSH, folder)
    before = hub.head("alice/model")
    (folder / "model.safetensors").write_bytes(noise(150_000, 2))
    proposal = """
info = api.upload_folder(repo_id="alice/model", folder_path=argv[0], create_pr=True, commit_message="Better")
answer = [info.pr_num, info.pr_revision, info.oid]
"""
    assert ask(hub, proposal, folder, token=hub.other_token)[:2] == [1, "refs/pr/1"]  # Bob may propose, not push
    assert hub.head("alice/model") == before
    assert hub.files("alice/model", "refs/pr/1")["model.safetensors"] == noise(150_000, 2)
    found = ask(
        hub,
        """
path = hf_hub_download("alice/model", "model.safetensors", revision="refs/pr/1")
pulls = api.get_repo_discussions("alice/model", discussion_type="pull_request")
pulls = [[d.num, d.title, d.author, d.status] for d in pulls]
details = api.get_discussion_details("alice/model", 1)
api.merge_pull_request("alice/model", 1)
answer = [pathlib.Path(path).stat().st_size, pulls, details.target_branch, [e.summary for e in details.events],
          api.get_discussion_details("alice/model", 1).status,
          [ref.ref for ref in api.list_repo_refs("alice/model", include_pull_requests=True).pull_requests]]
""",
    )
    assert found == [
        150_000,
        [[1, "Better", "bob", "open"]],
        "refs/heads/main",
        ["Better"],
        "merged",
        ["refs/pr/1"],
    ]
    assert hub.files("alice/model")["model.safetensors"] == noise(150_000, 2)
    assert hub.head("alice/model") != before


def test_a_pull_request_that_is_opened_empty_and_one_that_conflicts(hub):
    found = ask(
        hub,
        """
def put(text, name="a.txt", **given):
    return api.upload_file(path_or_fileobj=text, path_in_repo=name, repo_id="alice/model", **given).oid
api.create_repo("alice/model")
put(b"one")
numbers = [api.create_pull_request("alice/model", title).num for title in ("Mine", "Theirs")]
put(b"two", revision="refs/pr/1")
put(b"new", "b.txt", revision="refs/pr/1")
put(b"three", revision="refs/pr/2")
before = [api.get_discussion_details("alice/model", 1).status, api.list_repo_files("alice/model")]
api.merge_pull_request("alice/model", 1)
answer = [numbers, before, attempt(api.merge_pull_request, "alice/model", 2)[1],
          attempt(api.merge_pull_request, "alice/model", 1)[1]]
""",
    )
    assert found == [[1, 2], ["draft", [".gitattributes", "a.txt"]], 409, 400]
    files = hub.files("alice/model")
    assert (files["a.txt"], files["b.txt"]) == (b"two", b"new")


def test_who_may_do_what(hub, folder):
    ask(hub, PUSH, folder)
    before = hub.head("alice/model")
    code = """
def push():
    return api.upload_folder(repo_id="alice/model", folder_path=argv[0])
answer = [attempt(api.whoami), attempt(api.create_repo, "alice/model"), attempt(api.create_repo, "alice/new"),
          attempt(push), attempt(api.auth_check, "alice/model", write=True)]
"""
    (folder / "config.json").write_text("{}")
    wrong = ask(hub, code, folder, token=hub.wrong_token)
    assert [one[1] for one in wrong] == [401] * 5
    assert "invalid" in wrong[0][2].lower()
    reader = ask(hub, code, folder, token=hub.read_token)
    assert [one[:2] for one in reader] == [["returned", 0]] + [["HfHubHTTPError", 403]] * 4
    assert "write token" in reader[3][2]
    stranger = ask(hub, code, folder, token=hub.other_token)
    assert [one[:2] for one in stranger] == [["returned", 0]] + [["HfHubHTTPError", 403]] * 4
    nobody = ask(hub, code, folder, token=None)
    assert [one[1] for one in nobody[1:]] == [401] * 4
    assert nobody[0][0] == "LocalTokenNotFoundError"
    assert hub.head("alice/model") == before
    assert not hub.folder("models", "alice/new").exists()
    taken = ask(
        hub,
        """
answer = [attempt(api.create_repo, "alice/model"), attempt(api.create_repo, "alice/model", exist_ok=True),
          attempt(api.create_repo, "lab/model"), api.whoami()["auth"]["accessToken"]["role"]]
api.delete_repo("lab/model")
answer.append(api.repo_exists("lab/model"))
""",
    )
    assert taken[0][1] == 409
    assert [taken[1][0], taken[2][0], *taken[3:]] == ["returned", "returned", "write", False]
    assert not hub.leaks()


def test_missing_private_and_gated(hub):
    ask(
        hub,
        """
answer = 0
for name in ("open", "hidden", "gated"):
    api.create_repo(f"alice/{name}", private=name == "hidden")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=f"alice/{name}")
api.update_repo_settings("alice/gated", gated="auto")
""",
    )
    code = """
answer = [attempt(hf_hub_download, *given)[:2] for given in (
    ("alice/none", "a.txt"), ("alice/open", "b.txt"), ("alice/hidden", "a.txt"), ("alice/gated", "a.txt"),
    ("none", "a.txt"))]
answer += [attempt(api.auth_check, "alice/gated")[:2]]
answer += [attempt(snapshot_download, "alice/none")[:2], attempt(snapshot_download, "alice/open", revision="v9")[:2]]
"""
    missing, entry = ["RepositoryNotFoundError", 404], ["RemoteEntryNotFoundError", 404]
    found = ask(hub, code, token=hub.other_token)
    assert found[:4] == [missing, entry, missing, ["GatedRepoError", 403]]
    assert found[4:] == [missing, ["GatedRepoError", 403], missing, ["RevisionNotFoundError", 404]]
    nobody = ask(hub, code, token=None)
    assert [one[0] for one in nobody] == [one[0] for one in found]
    assert [one[1] for one in nobody] == [401, 404, 401, 401, 401, 401, 401, 404]
    mine = ask(hub, code, token=hub.read_token)
    assert [mine[2][0], mine[3][0]] == ["returned", "returned"]


def test_a_space_with_variables_and_secrets(hub, tmp_path):
    (tmp_path / "app.py").write_text("print('hello')")
    found = ask(
        hub,
        """
first = [{"key": "A", "value": "1"}]
url = api.create_repo("alice/demo", repo_type="space", space_sdk="gradio", space_variables=first)
api.upload_file(path_or_fileobj=argv[0], path_in_repo="app.py", repo_id="alice/demo", repo_type="space")
api.add_space_variable("alice/demo", "UNIT_MODEL_ID", "alice/model")
api.delete_space_variable("alice/demo", "A")
api.add_space_secret("alice/demo", "KEY", "hidden")
info = api.space_info("alice/demo")
answer = [str(url), info.sdk, sorted(s.rfilename for s in info.siblings), info.card_data.sdk,
          {k: v.value for k, v in api.get_space_variables("alice/demo").items()},
          list(api.get_space_secrets("alice/demo")), api.get_space_runtime("alice/demo").stage,
          pathlib.Path(hf_hub_download("alice/demo", "app.py", repo_type="space")).read_text(),
          attempt(api.create_repo, "alice/demo", repo_type="space", space_sdk="gradio")[1]]
hardware = api.request_space_hardware("alice/demo", "cpu-upgrade").requested_hardware
answer += [hardware, api.restart_space("alice/demo").stage]
""",
        tmp_path / "app.py",
    )
    assert found == [
        f"{hub.endpoint}/spaces/alice/demo",
        "gradio",
        [".gitattributes", "README.md", "app.py"],
        "gradio",
        {"UNIT_MODEL_ID": "alice/model"},
        ["KEY"],
        "BUILDING",
        "print('hello')",
        409,
        "cpu-upgrade",
        "BUILDING",
    ]
    secrets = ask(hub, "answer = str(api.get_space_secrets('alice/demo'))")
    assert "KEY" in secrets
    assert "hidden" not in secrets
    ask(hub, "answer = api.delete_space_secret('alice/demo', 'KEY')")
    assert ask(hub, "answer = api.get_space_secrets('alice/demo')") == {}


def test_a_card_that_the_hub_would_refuse_stops_the_push(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    code = """
api.create_repo("alice/model")
answer = attempt(api.upload_folder, repo_id="alice/model", folder_path=argv[0])
"""
    found = ask(hub, code, folder)
    assert found[0] == "ValueError"
    assert "Invalid metadata in README.md" in found[2]
    assert "config.json" not in hub.files("alice/model")


@pytest.mark.parametrize("kill", [False, True], ids=["every attempt cut", "server gone"])
def test_an_upload_that_is_cut_leaves_the_branch_and_a_rerun_completes(hub, folder, kill):
    ask(hub, PUSH, folder)
    before, files = hub.head("alice/model"), hub.files("alice/model")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(noise(200_000, 3))
    fault = hub.fail(method="PUT", route="/_storage/parts/", skip=2, times=1 if kill else 6, cut_after=1000, kill=kill)
    result = hub.python(IN_A_PROCESS + PUSH, folder)
    assert fault.hits == (1 if kill else 6)  # the client tries a part six times
    assert result.returncode != 0
    assert "model.safetensors" in result.stderr
    assert hub.token not in result.stdout + result.stderr
    assert (hub.head("alice/model"), hub.files("alice/model")) == (before, files)
    if kill:
        hub.start()
    after = ask(hub, PUSH, folder)
    assert hub.head("alice/model") == after != before
    assert hub.files("alice/model")["model.safetensors"] == noise(200_000, 3)
    assert hub.files("alice/model")["config.json"] == b"{}"


@pytest.mark.parametrize(
    "where",
    ["/preupload/", "/info/lfs/objects/batch", "/_storage/objects/", "/_storage/complete/", "/verify", "/commit/"],
)
def test_a_server_killed_at_any_step_shows_the_last_whole_commit(hub, folder, where):
    ask(hub, PUSH, folder)
    before = hub.head("alice/model")
    (folder / "model.safetensors").write_bytes(noise(100_000, 4))
    (folder / "figures" / "plot.png").write_bytes(noise(300, 5))
    hub.fail(route=where, cut_after=20, kill=True)
    assert attempt(ask, hub, PUSH, folder)[0] != "returned"
    again = HubServer(hub.root, hub.port, part_size=hub.part_size)  # as a new process would find it
    with again:
        assert again.head("alice/model") == before
        assert ask(again, "answer = api.model_info('alice/model').sha") == before
        assert ask(again, PUSH, folder) == again.head("alice/model") != before
        assert again.files("alice/model")["figures/plot.png"] == noise(300, 5)
    assert not again.errors


def test_by_itself_killed_and_started_again(hub, folder, tmp_path):
    """As a process of its own, for clients that must not share one with it."""
    command = [sys.executable, Path(hub_server.__file__), tmp_path / "own"]

    def start(*more):
        server = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
        settings = dict(server.stdout.readline().strip().split("=", 1) for _ in range(3))
        assert settings["HF_HUB_DISABLE_XET"] == "1"
        return server, HfApi(endpoint=settings["HF_ENDPOINT"], token=settings["HF_TOKEN"])

    server, api = start()
    try:
        api.create_repo("alice/model")
        sha = api.upload_folder(repo_id="alice/model", folder_path=folder).oid
        server.kill()
        server.communicate()
        server, api = start("--port", api.endpoint.rpartition(":")[2])
        assert api.model_info("alice/model").sha == sha
        server.send_signal(signal.SIGINT)
        assert "| `GET` | `/api/{kind}/{repo}` | 1 |" in server.communicate(timeout=20)[0]
    finally:
        server.kill()
        server.communicate()


def test_one_failing_answer_is_tried_again_by_the_client(hub, folder):
    hub.fail(method="PUT", route="/_storage/parts/", skip=1, status=503)
    hub.fail(method="POST", route="/info/lfs/objects/batch", status=500)
    hub.fail(method="PUT", route="/_storage/objects/", drop_answer=True)
    ask(hub, PUSH, folder)
    assert hub.files("alice/model")["model.safetensors"] == noise(200_000, 1)
    assert hub.calls()["PUT", "/_storage/parts/{kind}/{repo}/{oid}/{number}"] == 5
    assert sorted(one.status for one in hub.requests if one.method == "PUT") == [0] + [200] * 5 + [503]


def test_a_commit_whose_answer_is_lost_has_happened(hub, folder):
    hub.fail(route="/commit/", drop_answer=True)
    assert attempt(ask, hub, PUSH, folder)[0] != "returned"
    assert hub.files("alice/model")["model.safetensors"] == noise(200_000, 1)
    first = len(hub.requests)
    assert ask(hub, PUSH, folder) == hub.head("alice/model")
    assert not [one for one in hub.requests[first:] if "/commit/" in one.route]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub):
    hub.part_size = 1 << 24
    ask(
        hub,
        """
api.create_repo("alice/model")
data = bytes(range(256)) * 50_000  # 12.8 MB: the client keeps what it has in steps of 10 MiB
answer = api.upload_file(path_or_fileobj=data, path_in_repo="model.safetensors", repo_id="alice/model").oid
""",
    )
    hub.fail(method="GET", route="/_storage/objects/", cut_after=12_000_000)
    code = """
path = hf_hub_download("alice/model", "model.safetensors")
answer = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
"""
    assert ask(hub, code) == hashlib.sha256(bytes(range(256)) * 50_000).hexdigest()
    cut, rest = [one for one in hub.requests if one.method == "GET" and one.route.startswith("/_storage/")]
    assert cut.sent == 12_000_000
    assert rest.status == 206
    start = int(rest.header("Range").removeprefix("bytes=").rstrip("-"))
    assert start == 10 << 20
    assert rest.sent == 12_800_000 - start


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        (None, 200, 0, 1000),
        ("bytes=0-9", 206, 0, 10),
        ("bytes=990-", 206, 990, 1000),
        ("bytes=-7", 206, 993, 1000),
        ("bytes=995-2000", 206, 995, 1000),
        ("bytes=1000-", 416, 0, 0),
        ("lines=1-2", 200, 0, 1000),
    ],
)
def test_ranges(hub, asked, status, start, end):
    data = noise(1000)
    repository = hub.create("models", "alice/model", {}, "alice")
    path = repository.large(hashlib.sha256(data).hexdigest())
    path.parent.mkdir()
    path.write_bytes(data)
    address = hub.signed(f"/_storage/objects/models/alice/model/{path.name}")
    request = urllib.request.Request(address, headers={"Range": asked} if asked else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            got, body, headers = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        got, body, headers = error.code, b"", error.headers
    assert got == status
    if status == 416:
        assert headers["Content-Range"] == "bytes */1000"
        return
    assert body == data[start:end]
    if status == 206:
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/1000"


def test_storage_wants_its_signature_and_the_right_bytes(hub):
    hub.create("models", "alice/model", {}, "alice")
    oid = hashlib.sha256(b"right").hexdigest()
    address = hub.signed(f"/_storage/objects/models/alice/model/{oid}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for url, data, status in ((address[:-1] + "x", b"right", 403), (address, b"wrong", 400)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            opener.open(urllib.request.Request(url, data=data, method="PUT"), timeout=10)
        caught.value.close()
        assert caught.value.code == status
    assert not list((hub.root / "models/alice/model/lfs").iterdir())


def refusal(hub, line):
    """Status of a commit of one operation that no client would send."""
    header = {"key": "header", "value": {"summary": "trick"}}
    request = urllib.request.Request(
        f"{hub.endpoint}/api/models/alice/model/commit/main",
        data="\n".join(json.dumps(one) for one in (header, line)).encode(),
        headers={"Authorization": f"Bearer {hub.token}", "Content-Type": "application/x-ndjson"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=10)
    caught.value.close()
    return caught.value.code


def test_paths_that_leave_the_repository_are_refused(hub):
    hub.create("models", "alice/model", {}, "alice")
    before = hub.head("alice/model")
    for path in ("../x", "a/../../x", "/x", "a//b", ".git/config", "", "a\\..\\b"):
        value = {"path": path, "content": "", "encoding": "utf-8"}
        assert refusal(hub, {"key": "file", "value": value}) == 400
    assert hub.head("alice/model") == before


def test_a_commit_of_a_large_file_that_never_came_is_refused(hub):
    hub.create("models", "alice/model", {}, "alice")
    before = hub.head("alice/model")
    value = {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}
    assert refusal(hub, {"key": "lfsFile", "value": value}) == 400
    assert hub.head("alice/model") == before


def test_a_pushed_model_loads_by_its_revision_into_a_fresh_cache(hub, tmp_path):
    """The whole way: our export, the client, this server, and transformers in a process without our packages."""
    shas = []
    for name in ("first", "second"):  # a later push must not show through the revision
        model = unit_model(vision=vision_config())
        save_encoder(model, image_processor(), tmp_path / name)
        shas.append(ask(hub, PUSH, tmp_path / name))
    code = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel
found = {}
for sha in sys.argv[2:]:
    model, report = AutoModel.from_pretrained(
        "alice/model", revision=sha, code_revision=sha, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"], report
    AutoImageProcessor.from_pretrained("alice/model", revision=sha, code_revision=sha, trust_remote_code=True)
    found |= {f"{sha}/{key}": value for key, value in model.state_dict().items()}
assert "modeling_unit" not in sys.modules
save_file(found, sys.argv[1])
"""
    out = tmp_path / "found.safetensors"
    result = hub.run([sys.executable, "-I", "-c", code, out, *shas], token=None, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = load_file(out)
    for sha, name in zip(shas, ("first", "second"), strict=True):
        expected = load_file(tmp_path / name / "model.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[f"{sha}/{key}"], value, rtol=0, atol=0)
    assert not hub.uncovered


def test_a_leaked_token_is_found(hub):
    ask(
        hub,
        """
api.create_repo("alice/model")
text = f"x {api.token} y".encode()
answer = api.upload_file(path_or_fileobj=text, path_in_repo="log.txt", repo_id="alice/model").oid
""",
    )
    (found,) = hub.leaks()
    assert Path(found).read_text() == f"x {hub.token} y"


def test_what_is_not_covered_says_so(hub):
    ask(hub, "answer = str(api.create_repo('alice/model'))")
    found = ask(hub, "answer = attempt(lambda: list(api.list_repo_likers('alice/model')))")
    assert "does not cover" in found[2]
    assert hub.uncovered == ["GET /api/models/alice/model/likers"]


def test_the_client_gets_nothing_of_the_outer_environment(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "outer")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "outer"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    code = """
from huggingface_hub import constants, get_token
from huggingface_hub.utils._detect_agent import detect_agent
answer = [get_token(), constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, detect_agent()]
"""
    found = process(hub, code, token=None)
    assert found[:3] == [None, hub.endpoint, False]
    assert found[4] is None
    assert not found[3].startswith(os.environ["HF_HOME"])
    assert not found[3].startswith(str(tmp_path / "outer"))


def test_text_is_told_from_other_bytes():
    assert is_text("naïve ü".encode()[:-1])  # a sample may end within a character
    assert not is_text(b"\x89PNG")
    assert not is_text(b"a\0b")


def test_front_matter():
    assert front_matter(CARD)["tags"] == ["unit"]
    assert front_matter("# no metadata\n---\na: b\n---\n") == {}
    with pytest.raises(ValueError):
        front_matter("---\na: [\n---\n")
    with pytest.raises(ValueError, match="mapping"):
        front_matter("---\n- a\n---\n")
