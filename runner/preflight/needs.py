"""`python -m runner.preflight.needs PARENT`: the memory that a process of each run needs.

Reads `{"recipes", "output_root"}` as JSON and prints `{"num_bytes", "unknown"}`, both keyed by the
run's full name. `engines.sharing` calls it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.errors import hide_bitsandbytes_warning
from runner.processes import die_with_parent
from runner.recipe.parse import Recipe, parse_recipe


def main() -> int:
    """Answer the one request on stdin, and end with the parent. Library output goes to stderr."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the sweep reports it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # an estimate needs no GPU
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        request = json.load(sys.stdin)
        recipes = [parse_recipe(text, where="a planned run") for text in request["recipes"]]
        json.dump(estimate_all(recipes, Path(request["output_root"])), stream)
    return 0


def estimate_all(recipes: Sequence[Recipe], output_root: Path) -> dict[str, dict[str, Any]]:
    """Bytes of one process while it trains or generates, whichever is more, or the reason if they
    are unknown.
    """
    hide_bitsandbytes_warning()
    warnings.simplefilter("ignore", FutureWarning)
    from runner.preflight.names import pin_recipes
    from runner.preflight.sizes import estimate_sizes
    from runner.preflight.survey import check_recipes

    pinned = pin_recipes(recipes, output_root).recipes
    result = check_recipes(pinned, output_root)
    sizes = estimate_sizes(result, with_answers=True)
    # For runs whose model or rows cannot be read; other warnings do not matter here.
    doubts = {text: names for text, names in result.warnings.items() if "not estimated" in text}
    why_not = {
        name: text.partition("\n")[0]
        for text, names in {**result.errors, **doubts}.items()
        for name in names
    }
    num_bytes = {name: max(one.memory.total, one.answer_bytes or 0) for name, one in sizes.items()}
    unknown = {
        recipe.run.full_name: why_not.get(recipe.run.full_name, "its rows cannot be read")
        for recipe in recipes
        if recipe.run.full_name not in num_bytes
    }
    return {"num_bytes": num_bytes, "unknown": unknown}


if __name__ == "__main__":
    sys.exit(main())
