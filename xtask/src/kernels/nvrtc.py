"""Compiles one CUDA source with NVRTC: nvrtc.py LIBRARY ARCHITECTURE SOURCE OUT LOG INCLUDE...

Writes the compiler's remarks to LOG, then machine code (sm_) or PTX (compute_) to OUT: where there is
an OUT, its LOG is whole. Errors go to stderr.
"""
import ctypes
import os
import sys

library, architecture, source, out, log_path, *include = sys.argv[1:]
nvrtc = ctypes.CDLL(library)


def call(name, *arguments):
    """Calls a function of the library and returns its status."""
    return getattr(nvrtc, name)(*arguments)


def text(size, get):
    length = ctypes.c_size_t()
    if call(size, program, ctypes.byref(length)):
        sys.exit(size + " failed")
    buffer = ctypes.create_string_buffer(length.value)
    if call(get, program, buffer):
        sys.exit(get + " failed")
    return buffer.raw


def write(path, data):
    temporary = "%s.%d" % (path, os.getpid())
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


with open(source, "rb") as file:
    code = file.read()
program = ctypes.c_void_p()
if call("nvrtcCreateProgram", ctypes.byref(program), code, os.fsencode(source), 0, None, None):
    sys.exit("nvrtcCreateProgram failed")
options = [
    "--gpu-architecture=" + architecture,
    "--std=c++17",
    "-default-device",
    "--ptxas-options=-v",
] + ["-I" + path for path in include]
array = (ctypes.c_char_p * len(options))(*[os.fsencode(o) for o in options])
failed = call("nvrtcCompileProgram", program, len(options), array)
log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0")
if failed:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    sys.exit(log.decode(errors="replace") or nvrtc.nvrtcGetErrorString(failed).decode())
if architecture.startswith("sm_"):
    image = text("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
else:
    image = text("nvrtcGetPTXSize", "nvrtcGetPTX").rstrip(b"\0")
write(log_path, log)
write(out, image)
