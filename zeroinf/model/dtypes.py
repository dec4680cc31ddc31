"""The sizes of dtypes, by a torch dtype's name without `torch.`."""

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "bool": 1,
}
