"""``python -m slm_plugin``."""

from slm_plugin.cli import main

main()
