/* The same in C. */
#include <headpool/headpool.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char** argv) {
  hp_model* model = NULL;
  hp_session* session = NULL;
  const float* logits = NULL;
  hp_model_info info = HP_INIT(hp_model_info);
  int64_t prompt[64];
  size_t count = 0;
  for (int i = 2; i < argc; ++i) {
    char* end = argv[i];
    if (count < 64) prompt[count++] = strtoll(argv[i], &end, 10);
    if (end == argv[i] || *end) {
      fprintf(stderr, "%s is no token id, or one too many\n", argv[i]);
      return HP_ARGUMENT;
    }
  }
  const int64_t* prompts[] = {prompt};
  hp_status status = hp_model_open(argc > 1 ? argv[1] : "bundle", NULL, &model);
  if (!status) status = hp_model_get_info(model, &info);
  if (!status) status = hp_session_create(model, NULL, &session);
  if (!status) status = hp_session_prefill(session, prompts, &count, 1, &logits);
  if (status) {
    fprintf(stderr, "%s\n", hp_last_error());
  } else {
    int64_t best = 0;
    for (int64_t token = 1; token < info.vocab_size; ++token)
      if (logits[token] > logits[best]) best = token;
    printf("%lld\n", (long long)best);
  }
  hp_session_free(session);
  hp_model_free(model);
  return status;
}
