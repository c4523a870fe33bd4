"""Print docs/options.md, made from the fields of the package's classes of options.

python tools/options_table.py > docs/options.md
"""

from collections.abc import Iterator

from fedtan_hpc.config import help
from fedtan_hpc.config.submit_options import SubmitConfig

_INTRODUCTION = """# Options

This page lists all options of a job. `python -m fedtan_hpc --help=GROUP` shows the same.

- An option is written `name=value`, as in `rounds=20` or (of a group) `optimizer.lr=0.05`.
- `algorithm=`, `data=`, `task=`, `model=`, `partition=`, `optimizer=`, `lr_schedule=` and `launch=`
  choose a file of `conf/`, which sets options of its group: `algorithm=fedavg` sets
  `algorithm.name`. `experiment=` sets options of all groups: `quick`, `digits_shards`,
  `fashion_shards`, `scanners`, `shapes`, `tabular`, `imagenet_resnet50` and three `paper_...`.
- A list is written `data.shape=[3,32,32]`; `null` means no value. The shell needs quotes around
  spaces and brackets: `'lr_schedule.milestones=[60,80]'`.
- With `-m`, commas make a sweep: `-m algorithm=fedtan,fedavg seed=0,1,2` runs six jobs in turn.
- `--config-dir DIR experiment=NAME` reads your file `DIR/experiment/NAME.yaml`. It begins with the
  line `# @package _global_` and has options in YAML.
- `run_dir`, `resume`, `data.root` and `launch.folder` are paths with any letters; `~` is the home
  folder. In a sweep, a path with a comma needs further quotes: `run_dir="'a,b'"`.
- `--cfg job` shows the values of all options, and trains nothing.
- A mistake is one line with option, value, allowed values and remedy; exit code 2 (torchrun: 1).
"""


def page() -> Iterator[str]:
    """Yields the lines of the page in Markdown."""
    yield _INTRODUCTION.rstrip()
    for group in help.groups(SubmitConfig):
        yield f"\n## {group.name}\n\n{group.purpose}{_REMARKS.get(group.name, '')}\n"
        yield "| option | default | allowed | meaning |"
        yield "| --- | --- | --- | --- |"
        for entry in group.entries:
            allowed = entry.allowed.replace("|", "\\|")
            yield f"| `{entry.option}` | `{entry.default}` | {allowed} | {entry.meaning} |"


_REMARKS = {
    help.UNGROUPED: " These options have no group: write `rounds=20`.",
    "launch": " Only for `python -m fedtan_hpc.submit`.",
}


if __name__ == "__main__":
    print("\n".join(page()))
