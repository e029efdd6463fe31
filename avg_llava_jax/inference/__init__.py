"""Many requests at once on one device or mesh, without compiling after the first.

engine.py      the face: `submit` a request, get a ticket; a thread that goes round and round
intake.py      a request on the host: checked, its images cut into tiles, packed once their granularities are known
scheduler.py   who gets which slot, which chunk is read next, who decodes together: no device, no model
images.py      which pages of device memory hold which image
ladders.py     every static size there is, so every program there will be
device.py      the arrays on the device, and the calls that pad to those sizes
programs.py    what is compiled: pure functions of (config, params, arrays)
"""
