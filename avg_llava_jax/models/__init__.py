"""The network: encoder, connector, scaler, router and language model, composed in avg_llava.py."""
