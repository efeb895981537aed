# Fails where one of OBJECTS, compiled for the instruction set ISA, offers the linker a symbol that other files may use as well:
# a template or inline function from outside headpool::ISA. An older processor would then run instructions that it lacks.
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [WVwvu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "8headpool[0-9]+${ISA}")
if(weak)
  list(JOIN weak "\n" lines)
  message(FATAL_ERROR "${OBJECTS} shares symbols with files for other instruction sets:\n${lines}")
endif()
