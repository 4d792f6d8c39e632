// The whole test framework: a failed check prints where and ends the program with exit code 1.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);     \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (false)

#define CHECK_THROWS(expression, Type)                                                 \
  do {                                                                                 \
    bool is_thrown = false;                                                            \
    try {                                                                              \
      (void)(expression);                                                              \
    } catch (const Type&) {                                                            \
      is_thrown = true;                                                                \
    }                                                                                  \
    if (!is_thrown) {                                                                  \
      std::fprintf(stderr, "%s:%d: no %s from: %s\n", __FILE__, __LINE__, #Type, #expression); \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (false)
