"""``python -m slm_plugin``."""

from slm_plugin.cli import main

if __name__ == "__main__":
    main()
