// Marks a function that the library exports under its own name.

#pragma once

#define BESA_API extern "C" __attribute__((visibility("default")))
