/* Version and visibility, for C and C++. */
#ifndef HEADPOOL_API_H
#define HEADPOOL_API_H

#define HEADPOOL_VERSION "0.1.0"
#define HEADPOOL_API __attribute__((visibility("default")))

#endif
