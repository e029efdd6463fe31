"""From a request to its answer. The files in reading order:

api.py         `AvgLlava`: load a model, answer, stream, chat
engine.py      `Engine`: submit a request, get a ticket; rounds that encode, route, prefill and decode
scheduler.py   slots, prefix sharing, which prompts prefill together, which answers decode: no device, no model
image_pages.py pages of device memory and the images that they hold
job.py         a request inside the engine: images cut into tiles, prompt packed once granularities are chosen
device.py      cache and pool on the device, and the calls that pad to buckets
buckets.py     every static size, so every program
programs.py    compiled programs: pure functions of (config, params, arrays)
sampling.py    how each row of a program chooses its tokens, as arrays
guides.py      what an answer must be: a choice, an expression, a grammar, JSON
model.py       config, parameters, tokenizer; checks and tokenizes requests
choosing.py    the granularity of each image: router scores, a price of tokens, a budget
calibration.py the certainty thresholds stored with a checkpoint, for requests that escalate
requests.py, tickets.py, text_stream.py, stats.py    requests and answers, handles, streamed text, counters
"""
