"""The network, top to bottom: encoder, connector, scaler, router, language model, and their composition."""
