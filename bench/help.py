"""`python -m bench --help`: how to call it, the keys that matter most, and every YAML with its one line."""

import shutil
import textwrap
from importlib.metadata import PackageNotFoundError, version

from bench.config import choices, conf_dir, describe

USAGE = """\
Which training-data attribution method is right? A run trains a task's model, lets a method credit the training
examples, retrains to find out who was responsible, and reports how well the two agree.

usage: bench [key=value ...]               one run             (python -m bench is the same)
       bench -m key=value,value ...        every combination   (hydra/launcher=joblib: in parallel processes)
       bench --cfg job [key=value ...]     show the configuration, run nothing

  bench method=graddot task=digits
  bench -m method=graddot,ekfac task=digits seed=range(3)
  bench method=self_influence method@method.base=graddot
  bench method=custom method._target_=my_package.MyMethod method.k=3
"""

KEYS = {
    "method=, task=, model=": "one of those below; each task names its own model",
    "detail=layer|token": "the queries' scores taken apart by block or by token, into the record's scores",
    "evaluation=[lds,loo]": "what to judge by; the default is the task's; [] gives scores only",
    "truth.lds.subsets=50": "settings of the truth of an evaluation",
    "task.seed=0": "what the data is: selection and corruption",
    "seed=0": "the explained run: initialisation and batch order",
    "device=cpu": "where attribution is computed",
    "out=results": "where records go; a run that is there already is found, not done again",
    "rerun=true": "do it again all the same",
    "plan=true": "say what would be trained, how long and how much disk, and stop",
}

FIRST = ("method", "task", "model", "truth", "executor")


def help_text() -> str:
    """The whole help; groups and options are read from the folder of YAMLs."""
    sections = [("keys", list(KEYS.items()))]
    sections += [(f"{group}=", [(option, describe(group, option)) for option in choices(group)]) for group in groups()]
    width = 2 + max(len(name) for _, rows in sections for name, _ in rows) + 2
    columns = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    blocks = [USAGE]
    for title, rows in sections:
        lines = ["truth.<evaluation>.<key>=" if title == "truth=" else title]
        for name, text in rows:
            margin = f"  {name}".ljust(width)
            lines.append(textwrap.fill(text, columns, initial_indent=margin, subsequent_indent=" " * width))
        blocks.append("\n".join([*lines, ""]))
    return "\n".join(blocks).rstrip()


def groups() -> list[str]:
    """Every folder that holds a YAML, the most asked for first: `method`, `task`, ..., `method/curvature`."""
    found = {path.parent.relative_to(conf_dir()).as_posix() for path in conf_dir().glob("*/**/*.yaml")}
    return sorted(found, key=lambda g: (FIRST.index(g) if g in FIRST else len(FIRST), g))


def version_text() -> str:
    """`bench <version>`."""
    try:
        return f"bench {version('attribution-bench')}"
    except PackageNotFoundError:
        return "bench (not installed)"
