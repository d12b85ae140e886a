"""A fuzzer: damaged recipes, configs, plans, journals and cached results end in one clear line."""
