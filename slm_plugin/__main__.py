"""``python -m slm_plugin``: the command ``slm-plugin``, which imports nothing from here either."""

import os
import sys

# With -m, Python looks for modules in the working directory first; the console script does not.
try:
    if not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109
        del sys.path[0]
except OSError:  # The working directory was deleted: there is nothing to import from it.
    pass

from slm_plugin.cli import main

if __name__ == "__main__":
    main()
