"""Trains, evaluates and exports the tiny first-last-frame-to-video model that `wan_local/tiny_model/` ships."""
