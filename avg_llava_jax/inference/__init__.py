"""From a request to its answer. A reader goes down this list, and never up:

api.py         `AvgLlava`: load a model, ask it, stream, chat
engine.py      `Engine`: submit a request, get a ticket; rounds that encode, route, prefill and decode
scheduler.py   who gets which slot, which prompts are read together, who decodes: no device, no model
image_pages.py which pages of device memory hold which image
job.py         a request on its way: its images cut into tiles, its prompt packed once granularities are known
device.py      the arrays on the device, and the calls that pad to buckets
buckets.py     every static size there is, so every program there will be
programs.py    what is compiled: pure functions of (config, params, arrays)
model.py       config, parameters, tokenizer; a request checked and tokenized
choosing.py    which granularity each image gets: router scores, a price of tokens, a budget
requests.py, tickets.py, text_stream.py, stats.py    what is asked, answered, streamed and counted
"""
