"""Model configurations as TOML; read by `wan_local.settings` only."""
