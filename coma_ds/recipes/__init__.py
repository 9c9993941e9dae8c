"""Complete runs, shipped as YAML."""
