"""The network: Tokens, what reads them, and the ViT that writes them."""
