"""Shards hold observations alone, drawn once per image, and the same bytes each time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambient_core import errors
from ambient_core.errors import WorkFailed
from data_pipeline.corruption.corruption import Gaussian, generator_of
from data_pipeline.format.index import NAME, read_index
from data_pipeline.inputs.sources import open_source, prepare
from data_pipeline.inspect import main as inspect_main
from data_pipeline.shard import main, shard
from tests.data_pipeline.conftest import samples
from tests.refusals import refused


def observations(folder: Path) -> dict[str, np.ndarray]:
    return {key: x_n for key, (x_n, _) in samples(folder).items()}


def test_an_observation_is_the_image_plus_the_noise_of_its_key(pictures: Path, shards: Path) -> None:
    source, stored = open_source(str(pictures)), observations(shards)
    assert list(stored) == list(source.keys)
    residuals: list[np.ndarray] = []
    for i, key in enumerate(source.keys):
        x0 = prepare(source.read(i), None, 1)
        assert stored[key].dtype == np.float16
        z = generator_of(0, key).standard_normal(x0.shape, dtype=np.float32)
        np.testing.assert_allclose(stored[key], x0 + 0.4 * z, atol=2e-3)
        residuals.append(stored[key] - x0)
    noise = np.concatenate([r.ravel() for r in residuals])
    assert abs(noise.std() - 0.4) < 0.01, "the noise is as strong as it says"
    assert noise.max() > 1.2, "and was not clipped"


def test_a_clean_share_leaves_the_other_observations_as_they_are(pictures: Path, shards: Path, tmp_path: Path) -> None:
    shard(str(pictures), tmp_path / "some", Gaussian(0.4, clean_share=0.3), shard_size=8)
    noisy, some, source = observations(shards), observations(tmp_path / "some"), open_source(str(pictures))
    clean = [key for key in some if not np.array_equal(some[key], noisy[key])]
    assert 10 <= len(clean) <= 27, "about 18 of 60"
    for i, key in enumerate(source.keys):
        if key in clean:
            np.testing.assert_allclose(some[key], prepare(source.read(i), None, 1), atol=1e-3)
    levels = {key: about["sigma_n"] for key, (_, about) in samples(tmp_path / "some").items()}
    assert {key for key, level in levels.items() if level == 0} == set(clean)
    assert {level for level in levels.values() if level} == {0.4}


@pytest.mark.parametrize("stage", ["finished, and inspected", "interrupted"])
def test_no_clean_image_is_in_any_file(stage: str, pictures: Path, tmp_path: Path) -> None:
    """Nor in the plan, the records, the rejected ones' file and the pictures of the inspection."""
    folder, output = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, folder)
    (folder / "unreadable.png").write_bytes(b"not a picture")
    source = open_source(str(pictures))
    if stage == "interrupted":
        with pytest.raises(WorkFailed):
            shard(str(folder), output, Gaussian(0.4), shard_size=8)
        assert {"plan.json", "rejected.jsonl", "shard-000000.json"} <= {path.name for path in output.iterdir()}
    else:
        shard(str(folder), output, Gaussian(0.4), shard_size=8, max_rejected=1)
        inspect_main([str(output)])
        assert (output / "inspect" / "contact-sheet.png").is_file()
    everything = b"".join(path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file())
    for sheet in output.rglob("*.png"):  # what a viewer sees of it
        everything += np.asarray(Image.open(sheet)).tobytes()
    for i in range(len(source)):
        x0 = prepare(source.read(i), None, 1)
        row = int(x0[0].var(axis=1).argmax())  # rows through the disc; empty ones are zeros, as padding is
        middle = x0[0, row : row + 2]
        forms = [middle.astype(t).tobytes() for t in (np.float16, np.float32, np.float64)]
        forms += [source.read(i).pixels[row : row + 2].tobytes(), (pictures / f"disc {i:02d}.png").read_bytes()[60:100]]
        assert not any(form in everything for form in forms)


def test_the_same_request_gives_the_same_bytes_and_another_seed_others(
    pictures: Path, shards: Path, tmp_path: Path
) -> None:
    shard(str(pictures), tmp_path / "again", Gaussian(0.4), shard_size=8)
    shard(str(pictures), tmp_path / "seed1", Gaussian(0.4), shard_size=8, seed=1)
    names = sorted(path.name for path in shards.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((shards / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert not any((shards / name).read_bytes() == (tmp_path / "seed1" / name).read_bytes() for name in names)


def test_plain_webdataset_reads_the_shards(shards: Path) -> None:
    from webdataset.compat import WebDataset

    urls = [str(shards / entry.name) for entry in read_index(shards).shards]
    samples = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(samples) == 60
    assert json.loads(samples[0]["json"]) == {"sigma_n": 0.4}


def test_a_second_call_reuses_and_another_request_is_refused(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shard(str(pictures), output, Gaussian(0.4))
    before = (output / NAME).stat().st_mtime_ns
    shard(str(pictures), output, Gaussian(0.4))
    assert (output / NAME).stat().st_mtime_ns == before
    with refused("out", "mismatch"):
        shard(str(pictures), output, Gaussian(0.5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{pictures}", "{out}", "--sigma", "-0.5"], "--sigma -0.5"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--clean-share", "1.5"], "--clean-share 1.5: must be from 0 to 1"),
        (["{pictures}", "{out}", "--sigma", "nan"], "--sigma nan"),
        (["{tmp}/nowhere", "{out}", "--sigma", "0.5"], "no such folder"),
        (["{tmp}/empty", "{out}", "--sigma", "0.5"], "no image in it"),
        (["packaged:cats", "{out}", "--sigma", "0.5"], "no such set; there are digits"),
        (["packaged:digits/half", "{out}", "--sigma", "0.5"], "must be train, test or all"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--size", "0"], "--size 0"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--limit", "0"], "--limit 0"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--channels", "0"], "--channels 0: must be at least 1"),
        (["{pictures}", "{tmp}/sizes", "--sigma", "0.5"], "holds other files"),
        (["{pictures}", "{tmp}/sizes/a.png", "--sigma", "0.5"], "is a file; give a folder"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--workers", "0"], "--workers 0: must be at least 1"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--max-rejected", "-1"], "--max-rejected -1: must be a share"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--max-rejected", "1.5"], "--max-rejected 1.5: must be a share"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--max-rejected", "nan"], "--max-rejected nan: must be a share"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--max-rejected", "inf"], "--max-rejected inf: must be a share"),
        (
            ["{pictures}", "{out}", "--sigma", "0.5", "--cluster=c.yaml"],
            "--cluster=c.yaml: jobs are submitted by python -m slurm.shard",
        ),
        (
            ["{pictures}", "{out}", "--sigma", "0.5", "--jobs", "2"],
            "--jobs: jobs are submitted by python -m slurm.shard",
        ),
        (["", "{out}", "--sigma", "0.5"], "SOURCE: is empty (a variable that is not set?)"),
        (["{pictures}", "", "--sigma", "0.5"], "OUTPUT: is empty (a variable that is not set?)"),
        (["{pictures}", "{out}", "--sigma", "0.5", "--size", "9000"], "--size 9000: must be at most 8192"),
        (["{tmp}/alike", "{out}", "--sigma", "0.5"], "would both be named a__b_png"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    (tmp_path / "alike").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "sizes" / "a.png")
    Image.new("L", (16, 20)).save(tmp_path / "sizes" / "b.png")
    (tmp_path / "alike" / "a").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "alike" / "a" / "b.png")
    Image.new("L", (16, 16)).save(tmp_path / "alike" / "a__b.png")
    filled = [a.format(pictures=pictures, out=tmp_path / "out", tmp=tmp_path) for a in arguments]
    assert errors.run(lambda: main(filled)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert expected in message
    assert not (tmp_path / "out" / NAME).exists()


def test_a_disk_that_refuses_is_one_line(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = [str(pictures), str(tmp_path / "file" / "out"), "--sigma", "0.5"]
    assert errors.run(lambda: main(arguments)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"failed: {tmp_path / 'file' / 'out'}: Not a directory"


def test_images_that_had_to_be_enlarged_are_counted_aloud(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "in")
    Image.new("L", (40, 40)).save(tmp_path / "in" / "large.png")
    Image.new("L", (90, 7)).save(tmp_path / "in" / "thin.png")
    for size, count in ((7, 0), (8, 1), (16, 1), (17, 61)):
        shard(str(tmp_path / "in"), tmp_path / str(size), Gaussian(0.4), size=size, workers=2)
        said = capsys.readouterr().err
        assert (f"warning: {count} of 62 images had fewer pixels than --size {size}" in said) == bool(count)


def test_shards_of_a_source_that_changed_since_are_not_taken_for_it(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(pictures, source)
    before = shard(str(source), output, Gaussian(0.4))
    assert shard(str(source), output, Gaussian(0.4)) == before
    shutil.copy(source / "disc 00.png", source / "more.png")
    with refused("SOURCE", "mismatch"):
        shard(str(source), output, Gaussian(0.4))
    (source / "disc 00.png").unlink()
    with refused("SOURCE", "mismatch"):
        shard(str(source), output, Gaussian(0.4))
    shutil.rmtree(source)
    assert shard(str(source), output, Gaussian(0.4)) == before
    assert "no such folder or file" in capsys.readouterr().err


def test_damaged_shards_are_not_taken_for_done(pictures: Path, tmp_path: Path) -> None:
    shard(str(pictures), tmp_path / "out", Gaussian(0.4), shard_size=20)
    os.truncate(tmp_path / "out" / "shard-000001.tar", 3000)
    with refused("shard-000001.tar", "unreadable"):
        shard(str(pictures), tmp_path / "out", Gaussian(0.4), shard_size=20)


def test_an_output_inside_the_source_would_become_a_part_of_it(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pictures)
    for inside in (pictures / "out", tmp_path / "link" / "out", pictures):
        with refused("OUTPUT", "conflict"):
            shard(str(pictures), inside, Gaussian(0.4))
        assert not (pictures / "out").exists()


def test_no_workers_are_refused_before_anything_is_written_and_where_all_is(pictures: Path, tmp_path: Path) -> None:
    words = [str(pictures), str(tmp_path / "out"), "--sigma", "0.5"]
    assert errors.run(lambda: main([*words, "--workers", "0"])) == 2
    assert not (tmp_path / "out").exists()
    assert errors.run(lambda: main([*words, "--workers", "1"])) == 0
    assert errors.run(lambda: main([*words, "--workers", "0"])) == 2
