"""How several layers become one."""
