"""The four networks: transformer, VAE, text encoder, image encoder."""
