from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_runtime import bundle as bundles
from vggedge_runtime.bundle import FORMAT_VERSION, Bundle, check_replaceable, hash_file, write_bundle, write_manifest
from vggedge_runtime.engine_cache import list_engines, read_engine
from vggedge_runtime.errors import BundleError
from vggedge_runtime.preprocess import Normalization
from vggedge_runtime.session import Session


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place, as a careless or hostile hand would."""
    source = bundle / "manifest.json"
    data = json.loads(source.read_bytes())
    change(data)
    source.write_text(json.dumps(data))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    """Everything in ``folder``, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: type[BaseException]) -> None:
    with write_bundle(path) as folder:
        (folder / "graphs").mkdir()
        (folder / "graphs/half").write_bytes(b"...")
        raise error


class TestOpen:
    def test_what_was_written_is_read(self, tiny_bundle: Path) -> None:
        manifest = Bundle.open(str(tiny_bundle)).manifest
        assert manifest.labels == ("red", "green", "blue")
        assert manifest.image.shape == (4, 6, 3)
        assert set(manifest.files) == {
            "graphs/model.fp32.onnx",
            "golden/inputs.npy",
            "golden/outputs.fp32.npy",
            "labels.txt",
        }

    @pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
    def test_no_bundle(self, place: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(BundleError, match=rf"{place}: no manifest\.json in it.*vggedge export"):
            Bundle.open(tmp_path / place)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": "1"}', b'{"format_version": true}', b"{}"],
    )
    def test_damaged(self, text: bytes, tiny_bundle: Path) -> None:
        (tiny_bundle / "manifest.json").write_bytes(text)
        with pytest.raises(BundleError, match=r"manifest\.json: damaged manifest"):
            Bundle.open(tiny_bundle)

    def test_cut_short(self, tiny_bundle: Path) -> None:
        source = tiny_bundle / "manifest.json"
        source.write_bytes(source.read_bytes()[:-40])
        with pytest.raises(BundleError, match="damaged manifest"):
            Bundle.open(tiny_bundle)

    @pytest.mark.parametrize("field", ["format_version", "labels", "image", "graphs", "golden", "files"])
    def test_missing_field(self, field: str, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.pop(field))
        with pytest.raises(BundleError, match=f"damaged manifest.*{field}"):
            Bundle.open(tiny_bundle)

    def test_wrong_type(self, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(parameters="many"))
        with pytest.raises(BundleError, match=r"damaged manifest.*parameters"):
            Bundle.open(tiny_bundle)

    def test_impossible_image_size(self, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data["image"].update(height=0))
        with pytest.raises(BundleError, match=r"manifest\.json: damaged manifest.*0x6 is no image size"):
            Bundle.open(tiny_bundle)

    def test_version_from_the_future(self, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(format_version=FORMAT_VERSION + 1, labels="another schema"))
        with pytest.raises(BundleError, match=rf"format version {FORMAT_VERSION + 1}; .* up to {FORMAT_VERSION}\. Up"):
            Bundle.open(tiny_bundle)

    @pytest.mark.parametrize("version", [0, -1])
    def test_a_version_that_never_was(self, version: int, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(format_version=version))
        with pytest.raises(
            BundleError, match=rf"damaged manifest \(format_version is {version}; the first one was 1\)"
        ):
            Bundle.open(tiny_bundle)

    @pytest.mark.parametrize("version", ["1", True, 1.0, None, [1]])
    def test_a_version_that_is_no_whole_number(self, version: object, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(format_version=version))
        with pytest.raises(BundleError, match=r"damaged manifest .*missing or no whole number"):
            Bundle.open(tiny_bundle)

    def test_fields_of_a_later_minor_change_are_ignored(self, tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(note="added by hand"))
        assert Bundle.open(tiny_bundle).manifest.name == "tiny"

    @pytest.mark.parametrize("name", ["../secret", "graphs/../../secret", "/etc/passwd"])
    def test_files_outside_the_bundle_are_not_trusted(self, name: str, tiny_bundle: Path) -> None:
        (tiny_bundle.parent / "secret").write_bytes(b"x")
        record = {"sha256": hashlib.sha256(b"x").hexdigest(), "size_bytes": 1}
        edit(tiny_bundle, lambda data: data["files"].update({name: record}))
        with pytest.raises(BundleError, match="outside the bundle"):
            Bundle.open(tiny_bundle)

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "graphs/other.onnx", ""])
    @pytest.mark.parametrize(
        "put",
        [
            lambda data, name: data["graphs"]["fp32"].update(file=name),
            lambda data, name: data["golden"].update(inputs=name),
            lambda data, name: data["golden"]["outputs"].update(fp32=name),
        ],
        ids=["graph", "golden inputs", "golden outputs"],
    )
    def test_graphs_and_golden_must_be_covered(
        self, put: Callable[[dict[str, Any], str], None], name: str, tiny_bundle: Path
    ) -> None:
        edit(tiny_bundle, lambda data: put(data, name))
        with pytest.raises(BundleError, match=r"manifest\.json: .*no hash"):
            Bundle.open(tiny_bundle)

    def test_graph_lists_those_there_are(self, tiny_bundle: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        assert bundle.graph("fp32").file == "graphs/model.fp32.onnx"
        with pytest.raises(BundleError, match=r"no graph 'int8'.*it has: fp32"):
            bundle.graph("int8")


class TestUpgrades:
    """Format version 4, reached by three upgrades that each need the one before."""

    @pytest.fixture
    def ran(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Versions that upgrades found in ``format_version``, in the order in which they ran."""
        ran: list[int] = []

        def rename(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
            def upgrade(data: dict[str, Any]) -> dict[str, Any]:
                ran.append(data["format_version"])
                return {key: value for key, value in data.items() if key != old} | {new: data[old]}

            return upgrade

        upgrades = {
            2: rename("classes", "names"),
            1: rename("words", "classes"),
            3: rename("names", "labels"),
        }
        monkeypatch.setattr(bundles, "FORMAT_VERSION", 4)
        monkeypatch.setattr(bundles, "UPGRADES", upgrades)
        return ran

    @pytest.mark.parametrize(("version", "field"), [(1, "words"), (2, "classes"), (3, "names"), (4, "labels")])
    def test_every_older_version_is_lifted_step_by_step(
        self, version: int, field: str, ran: list[int], tiny_bundle: Path
    ) -> None:
        def age(data: dict[str, Any]) -> None:
            data["format_version"] = version
            data[field] = data.pop("labels")

        edit(tiny_bundle, age)
        stored = (tiny_bundle / "manifest.json").read_bytes()
        manifest = Bundle.open(tiny_bundle).manifest
        assert manifest.labels == ("red", "green", "blue")
        assert ran == list(range(version, 4))
        assert manifest.format_version == 4  # what is in memory is of the newest, whatever the file is
        assert (tiny_bundle / "manifest.json").read_bytes() == stored

    def test_what_an_upgrade_does_not_find_is_damage(self, ran: list[int], tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(format_version=2))  # and has no "classes"
        with pytest.raises(
            BundleError, match=r"damaged manifest \(not what format version 2 had: KeyError\('classes'\)\)"
        ):
            Bundle.open(tiny_bundle)
        assert ran == [2]

    @pytest.mark.parametrize("wrong", [None, 3, "text", [1]])
    def test_a_field_of_another_type_is_damage(
        self, wrong: object, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def count(data: dict[str, Any]) -> dict[str, Any]:
            return data | {"parameters": sum(graph["parameters"] for graph in data["graphs"].values())}

        monkeypatch.setattr(bundles, "FORMAT_VERSION", 2)
        monkeypatch.setattr(bundles, "UPGRADES", {1: count})
        edit(tiny_bundle, lambda data: data.update(format_version=1, graphs=wrong))
        with pytest.raises(BundleError, match=r"damaged manifest \(not what format version 1 had"):
            Bundle.open(tiny_bundle)

    def test_the_future_is_refused_before_any_upgrade(self, ran: list[int], tiny_bundle: Path) -> None:
        edit(tiny_bundle, lambda data: data.update(format_version=5))
        with pytest.raises(
            BundleError, match=r"format version 5; this vggedge reads up to 4\. Upgrade vggedge here, or"
        ):
            Bundle.open(tiny_bundle)
        assert ran == []

    def test_there_is_an_upgrade_from_every_older_version(self) -> None:
        assert set(bundles.UPGRADES) == set(range(1, FORMAT_VERSION))


class TestStoredBundles:
    """Bundles of every format version, as they were written then; fixtures/README.md tells of them."""

    STORED = sorted(Path(__file__).with_name("fixtures").glob("bundle_*"))

    def test_there_is_one_for_every_version(self) -> None:
        versions = {json.loads((path / "manifest.json").read_bytes())["format_version"] for path in self.STORED}
        assert versions == set(range(1, FORMAT_VERSION + 1))

    @pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
    def test_opens_and_verifies(self, path: Path) -> None:
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        assert manifest.format_version == FORMAT_VERSION
        there = {str(each.relative_to(path).as_posix()) for each in path.rglob("*") if each.is_file()}
        assert set(manifest.files) == {name for name in there if not name.startswith(("engines/", "manifest.json"))}
        for name in manifest.files:
            bundle.verified_path(name)
        for record in list_engines(path):
            assert len(read_engine(path, record.key)) == record.size_bytes
        assert all(each.stat().st_size < 10_000 for each in path.rglob("*") if each.name != "manifest.json")

    @pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
    def test_says_what_it_said(self, path: Path) -> None:
        manifest = Bundle.open(path).manifest
        assert manifest.labels == ("cat", "dog", "Ärger ☂")
        assert list(manifest.graphs) == ["fp32", "fp16", "mixed-rtx"]
        mixed = manifest.graphs["mixed-rtx"]
        assert mixed.plan is not None
        assert (mixed.plan.max_drop, mixed.plan.chosen.float_layers) == (0.5, ("conv",))
        assert (mixed.layers[0].snr_db, mixed.evidence.images, len(mixed.evidence.flips)) == (-3.25, 40, 13)
        assert manifest.image.normalization == Normalization((1, 2, 3), (4, 5, 6))
        assert manifest.gate is not None
        assert [verdict.decision for verdict in manifest.gate.verdicts.values()] == ["fail", "undecided", "pass"]

    @pytest.mark.parametrize("graph", ["fp32", "fp16", "mixed-rtx"])
    @pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
    def test_runs(self, path: Path, graph: str) -> None:
        pytest.importorskip("onnxruntime")
        with Session.open(path, "ort", graph) as session:
            bright = np.zeros((3, 4, 6, 3), np.uint8)
            bright[np.arange(3), ..., np.arange(3)] = 200
            assert session.predict(bright).argmax(axis=1).tolist() == [0, 1, 2]
            assert session.predict(bright).max(axis=1) == pytest.approx(0.9999, abs=1e-4)


class TestVerifiedPath:
    def test_an_untouched_file(self, tiny_bundle: Path) -> None:
        assert Bundle.open(tiny_bundle).verified_path("labels.txt") == tiny_bundle / "labels.txt"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:-1],
            lambda data: b"",
            lambda data: data + b"\0",
            lambda data: bytes([data[0] ^ 1]) + data[1:],
        ],
        ids=["truncated", "emptied", "longer", "one bit"],
    )
    def test_changed_content(self, damage: Callable[[bytes], bytes], tiny_bundle: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        path = tiny_bundle / "graphs/model.fp32.onnx"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(BundleError, match=r"model\.fp32\.onnx: its content is not what export wrote"):
            bundle.verified_path("graphs/model.fp32.onnx")

    def test_missing(self, tiny_bundle: Path) -> None:
        (tiny_bundle / "labels.txt").unlink()
        with pytest.raises(BundleError, match=r"labels\.txt: missing.*Copy the whole bundle"):
            Bundle.open(tiny_bundle).verified_path("labels.txt")

    @pytest.mark.parametrize("name", ["extra.txt", "manifest.json", "../labels.txt", "./labels.txt"])
    def test_not_covered(self, name: str, tiny_bundle: Path) -> None:
        (tiny_bundle / "extra.txt").touch()
        with pytest.raises(BundleError, match="covers no file"):
            Bundle.open(tiny_bundle).verified_path(name)

    def test_a_link_counts_by_what_it_points_to(self, tiny_bundle: Path) -> None:
        path, store = tiny_bundle / "labels.txt", tiny_bundle.parent / "store.txt"
        path.rename(store)
        path.symlink_to(store)
        bundle = Bundle.open(tiny_bundle)
        assert bundle.verified_path("labels.txt") == path
        store.write_text("others\n")
        with pytest.raises(BundleError, match="not what export wrote"):
            bundle.verified_path("labels.txt")

    def test_a_folder_in_a_files_place(self, tiny_bundle: Path) -> None:
        (tiny_bundle / "labels.txt").unlink()
        (tiny_bundle / "labels.txt").mkdir()
        with pytest.raises(BundleError, match="missing"):
            Bundle.open(tiny_bundle).verified_path("labels.txt")


class TestWriteManifest:
    def test_records_all_but_engines(self, tiny_bundle: Path) -> None:
        manifest = Bundle.open(tiny_bundle).manifest
        (tiny_bundle / "manifest.json").unlink()
        (tiny_bundle / "engines/ab").mkdir(parents=True)
        (tiny_bundle / "engines/ab/fp32.engine").write_bytes(b"plan")
        (tiny_bundle / "deep/er").mkdir(parents=True)
        (tiny_bundle / "deep/er/engines").write_bytes(b"no plan")
        write_manifest(tiny_bundle, manifest)
        found = Bundle.open(tiny_bundle).manifest.files
        assert set(found) == {*manifest.files, "deep/er/engines"}
        assert found["deep/er/engines"].size_bytes == 7
        assert found["deep/er/engines"].sha256 == hashlib.sha256(b"no plan").hexdigest()

    def test_is_readable_text(self, tiny_bundle: Path) -> None:
        text = (tiny_bundle / "manifest.json").read_text()
        assert text.startswith('{\n  "format_version": 1,\n')
        assert text.endswith("}\n")

    def test_hash_of_more_than_one_block(self, tmp_path: Path) -> None:
        data = os.urandom((1 << 20) + 3)
        (tmp_path / "big").write_bytes(data)
        assert hash_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


class TestWriteBundle:
    def test_makes_the_folders_above(self, tmp_path: Path) -> None:
        with write_bundle(tmp_path / "a/b/new") as folder:
            assert not any(folder.iterdir())
            (folder / "x").write_text("1")
        assert content(tmp_path) == {"a/b/new/x": b"1"}

    def test_is_not_there_before_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "new"
        with write_bundle(path) as folder:
            assert folder.parent == tmp_path  # the same file system, so that the rename is atomic
            assert not path.exists()
        assert path.is_dir()

    def test_others_may_read_it(self, tmp_path: Path) -> None:
        with write_bundle(tmp_path / "new") as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755

    def test_replaces_an_old_bundle_as_a_whole(self, tiny_bundle: Path) -> None:
        old = content(tiny_bundle)
        (tiny_bundle / "engines").mkdir()
        with write_bundle(tiny_bundle) as folder:
            (folder / "manifest.json").write_text("new")
            assert content(tiny_bundle) == old
        assert content(tiny_bundle) == {"manifest.json": b"new"}
        assert not (tiny_bundle / "engines").exists()
        assert names(tiny_bundle.parent) == ["tiny"]

    def test_fills_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        with write_bundle(tmp_path / "new") as folder:
            (folder / "x").touch()
        assert content(tmp_path) == {"new/x": b""}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_error_leaves_the_old_one_and_nothing_else(self, error: type[BaseException], tiny_bundle: Path) -> None:
        old = content(tiny_bundle)
        with pytest.raises(error):
            write_half(tiny_bundle, error)
        assert content(tiny_bundle) == old
        assert names(tiny_bundle.parent) == ["tiny"]

    def test_an_error_leaves_nothing_where_nothing_was(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            write_half(tmp_path / "new", KeyboardInterrupt)
        assert not names(tmp_path)

    def test_a_failing_rename_brings_the_old_one_back(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = content(tiny_bundle)
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if ".partial-" in self.name:
                raise OSError("disk says no")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="disk says no"), write_bundle(tiny_bundle):
            pass
        assert content(tiny_bundle) == old
        assert names(tiny_bundle.parent) == ["tiny"]

    def test_something_appears_between_the_renames(self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = content(tiny_bundle)
        rename = Path.rename

        def intrude(self: Path, target: Path) -> Path:
            done = rename(self, target)
            if self == tiny_bundle:
                self.mkdir()
                (self / "thesis.txt").write_text("years of work")
            return done

        monkeypatch.setattr(Path, "rename", intrude)
        with pytest.raises(OSError, match="not empty"), write_bundle(tiny_bundle) as folder:
            (folder / "x").touch()
        assert content(tiny_bundle) == {"thesis.txt": b"years of work"}
        kept = names(tiny_bundle.parent)[0]
        assert kept.startswith(f".tiny.old-{os.getpid()}-")
        assert content(tiny_bundle.with_name(kept)) == old

    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize("place", [".partial-", "tiny"])
    def test_ctrl_c_in_the_swap_leaves_one_whole_bundle(
        self, place: str, moment: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = content(tiny_bundle)
        rename = Path.rename

        def interrupt(self: Path, target: Path) -> Path:
            if place not in self.name or ".old-" in self.name:
                return rename(self, target)
            if moment == "after":
                rename(self, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt), write_bundle(tiny_bundle) as folder:
            (folder / "manifest.json").write_text("new")
        new_stands = (place, moment) == (".partial-", "after")
        assert content(tiny_bundle) == ({"manifest.json": b"new"} if new_stands else old)
        assert names(tiny_bundle.parent) == ["tiny"]

    @pytest.mark.parametrize(
        "manifest",
        [
            '{"manifest_version": 3, "name": "a web app", "icons": []}',
            '{"format_version": "1", "graphs": {}, "golden": {}}',
            '{"format_version": 1, "graphs": {}}',
            "[]",
            "{",
            "",
        ],
    )
    def test_a_manifest_of_something_else(self, manifest: str, tmp_path: Path) -> None:
        (tmp_path / "app").mkdir()
        (tmp_path / "app/manifest.json").write_text(manifest)
        with pytest.raises(BundleError, match=r"app: exists and is no bundle.*Remove it or name another"):
            check_replaceable(tmp_path / "app")

    def test_a_damaged_bundle_and_one_from_the_future_are_replaced(self, tiny_bundle: Path) -> None:
        for entry in ("report.html", "cache", "engines"):
            (tiny_bundle / entry).mkdir()
        edit(tiny_bundle, lambda data: data.update(format_version=FORMAT_VERSION + 7, labels="another schema"))
        edit(tiny_bundle, lambda data: data.pop("files"))
        check_replaceable(tiny_bundle)

    def test_a_bundle_that_holds_something_of_the_users(self, tiny_bundle: Path) -> None:
        (tiny_bundle / "thesis").mkdir()
        (tiny_bundle / ".git").mkdir()
        with pytest.raises(BundleError, match=r"also holds \.git, thesis, which vggedge did not write.*Move"):
            check_replaceable(tiny_bundle)

    @pytest.mark.parametrize("empty", [False, True])
    def test_what_appears_during_the_export_is_kept(self, empty: bool, tiny_bundle: Path) -> None:
        path = tiny_bundle.with_name("empty") if empty else tiny_bundle
        path.mkdir(exist_ok=True)
        old = content(path)

        def export() -> None:
            with write_bundle(path):
                (path / "thesis.txt").write_text("years of work")

        with pytest.raises(BundleError, match="is no bundle" if empty else r"also holds thesis\.txt"):
            export()
        assert content(path) == old | {"thesis.txt": b"years of work"}
        assert not [name for name in names(path.parent) if name.startswith(".")]

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_what_is_no_bundle_is_not_replaced(self, kind: str, tmp_path: Path) -> None:
        place = tmp_path / "mine"
        if kind == "folder":
            place.mkdir()
        (place / "thesis.txt" if kind == "folder" else place).write_text("years of work")
        old = content(tmp_path)
        entered = False
        with pytest.raises(BundleError, match="exists and is no bundle"), write_bundle(place):
            entered = True
        assert not entered
        assert content(tmp_path) == old

    def test_a_file_among_the_folders_above(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BundleError, match=r"file/deep/new: cannot be written.*file"):
            check_replaceable(tmp_path / "file/deep/new")

    def test_a_link_stays_a_link(self, tiny_bundle: Path) -> None:
        current = tiny_bundle.with_name("current")
        current.symlink_to("tiny")
        with write_bundle(current) as folder:
            (folder / "manifest.json").write_text("new")
        assert current.readlink() == Path("tiny")
        assert content(tiny_bundle) == {"manifest.json": b"new"}
        assert names(tiny_bundle.parent) == ["current", "tiny"]

    def test_the_folder_one_stands_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "new").mkdir()
        monkeypatch.chdir(tmp_path / "new")
        with write_bundle(Path()) as folder:
            (folder / "x").touch()
        assert content(tmp_path) == {"new/x": b""}


class TestLeftovers:
    """Of a write that was killed with SIGKILL, which nothing can catch."""

    @pytest.fixture
    def dead(self) -> int:
        """PID of a process that has ended."""
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    def test_a_killed_write_is_cleared_by_the_next(self, tiny_bundle: Path) -> None:
        program = (
            "import os, pathlib, signal, sys\n"
            "from vggedge_runtime.bundle import write_bundle\n"
            "with write_bundle(pathlib.Path(sys.argv[1])) as folder:\n"
            "    (folder / 'half').mkdir()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program, str(tiny_bundle)])
        assert process.wait() == -9
        assert names(tiny_bundle.parent)[0].startswith(f".tiny.partial-{process.pid}-")
        with pytest.raises(KeyboardInterrupt):
            write_half(tiny_bundle, KeyboardInterrupt)
        assert names(tiny_bundle.parent) == ["tiny"]
        Bundle.open(tiny_bundle)

    def test_a_kill_between_the_renames_loses_nothing(self, tiny_bundle: Path, dead: int) -> None:
        old = content(tiny_bundle)
        tiny_bundle.rename(tiny_bundle.with_name(f".tiny.old-{dead}-abcd_123"))
        with pytest.raises(KeyboardInterrupt):
            write_half(tiny_bundle, KeyboardInterrupt)
        assert content(tiny_bundle) == old
        assert names(tiny_bundle.parent) == ["tiny"]

    def test_an_old_bundle_goes_where_a_new_one_stands(self, tiny_bundle: Path, dead: int) -> None:
        (tiny_bundle.with_name(f".tiny.old-{dead}-abcd_123") / "engines").mkdir(parents=True)
        with write_bundle(tiny_bundle):
            assert [name for name in names(tiny_bundle.parent) if ".old-" in name] == []

    @pytest.mark.parametrize(
        "name",
        [
            ".tiny.partial-{alive}-abcd_123",
            ".tiny.old-{alive}-abcd_123",
            ".tiny2.partial-{dead}-abcd_123",
            "tiny.partial-{dead}-abcd_123",
            ".tiny.old-{dead}",
            ".tiny.old-2024",
            ".tiny.old-{dead}-abcd_123.tar",
        ],
    )
    def test_what_is_in_use_or_not_ours_stays(self, name: str, tiny_bundle: Path, dead: int) -> None:
        other = tiny_bundle.with_name(name.format(alive=os.getpid(), dead=dead))
        other.mkdir()
        with write_bundle(tiny_bundle) as folder:
            (folder / "x").touch()
        assert names(tiny_bundle.parent) == sorted([other.name, "tiny"])

    def test_a_name_that_looks_like_a_leftover(self, tmp_path: Path, tiny: Callable[..., Bundle]) -> None:
        path = tmp_path / "a.partial-1"
        tiny(path)
        tiny(path)
        assert names(tmp_path) == ["a.partial-1"]


def test_the_manifest_survives_a_round_trip(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=type(manifest)) == manifest


def test_a_manifest_from_before_adaptations_and_colour_order_has_none_and_rgb(tiny_bundle: Path) -> None:
    def change(data: dict) -> None:
        del data["adaptations"]
        data["image"]["normalization"] = {"mean": [1, 2, 3], "std": [4, 5, 6]}

    edit(tiny_bundle, change)
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.adaptations == ()
    assert manifest.image.normalization == Normalization((1, 2, 3), (4, 5, 6), "rgb")
    # An older vggedge forbids unknown fields there: it reads what it understands and refuses BGR.
    assert b"order" not in msgspec.json.encode(manifest)
    assert msgspec.json.encode(Normalization((1, 2, 3), (4, 5, 6), "bgr")).endswith(b'"order":"bgr"}')
