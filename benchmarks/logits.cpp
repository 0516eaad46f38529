// Raw float32 numbers of a GGUF pair, for comparing builds of llama.cpp; see arm64.py.
//
//   logits text  MODEL N_BATCH REPACK ID...              -> (n_ids, n_vocab), every position
//   logits image MODEL MMPROJ WIDTH HEIGHT < RGB bytes   -> (n_image_tokens, n_embd)
//
// N_BATCH 1 runs the kernels for one row, larger ones those for several. REPACK 0 keeps the file's
// order of weights, 1 allows the CPU's own. The system line and llama.cpp's log go to stderr.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "mtmd.h"

static const int N_THREADS = 1;  // emulated, on shared cores, two mostly wait for each other

[[noreturn]] static void fail(const std::string & what) {
    std::fprintf(stderr, "logits: %s\n", what.c_str());
    std::exit(1);
}

static llama_model * load(const char * path, bool repack, bool vocab_only) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers    = 0;
    params.use_extra_bufts = repack;
    params.vocab_only      = vocab_only;
    llama_model * model = llama_model_load_from_file(path, params);
    if (!model) {
        fail(std::string(path) + ": cannot be loaded");
    }
    return model;
}

static void write_floats(const float * values, size_t n) {
    if (std::fwrite(values, sizeof(float), n, stdout) != n) {
        fail("stdout: cannot be written");
    }
}

static void print_logits(const char * path, int n_batch, bool repack, std::vector<llama_token> & ids) {
    llama_model * model = load(path, repack, false);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = ids.size();
    params.n_batch = params.n_ubatch = n_batch;
    params.n_threads = params.n_threads_batch = N_THREADS;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("no context");
    }
    const size_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch batch = llama_batch_init(n_batch, 0, 1);
    for (size_t done = 0; done < ids.size(); done += batch.n_tokens) {
        batch.n_tokens = std::min<size_t>(n_batch, ids.size() - done);
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i]     = ids[done + i];
            batch.pos[i]       = done + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = true;
        }
        if (llama_decode(context, batch) != 0) {
            fail("llama_decode failed");
        }
        for (int i = 0; i < batch.n_tokens; i++) {
            write_floats(llama_get_logits_ith(context, i), n_vocab);
        }
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
}

static void print_embeddings(const char * path, const char * mmproj, unsigned width, unsigned height) {
    std::vector<unsigned char> pixels(3 * width * height);
    if (std::fread(pixels.data(), 1, pixels.size(), stdin) != pixels.size()) {
        fail("stdin: fewer than 3 * WIDTH * HEIGHT bytes");
    }
    llama_model * model = load(path, false, false);  // libmtmd needs the vocabulary, we the width
    mtmd_context_params params = mtmd_context_params_default();
    params.use_gpu   = false;
    params.n_threads = N_THREADS;
    params.warmup    = false;
    params.image_min_tokens = 1;  // the size is chosen already
    mtmd_context * context = mtmd_init_from_file(mmproj, model, params);
    if (!context) {
        fail(std::string(mmproj) + ": cannot be loaded");
    }
    mtmd_bitmap * bitmap = mtmd_bitmap_init(width, height, pixels.data());
    const std::string marker = mtmd_get_marker(context);
    const mtmd_input_text text = { marker.data(), marker.size(), false, true };
    const mtmd_bitmap * bitmaps[] = { bitmap };
    mtmd_input_chunks * chunks = mtmd_input_chunks_init();
    if (mtmd_tokenize(context, chunks, &text, bitmaps, 1) != 0) {
        fail("mtmd_tokenize failed");
    }
    for (size_t i = 0; i < mtmd_input_chunks_size(chunks); i++) {
        const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, i);
        if (mtmd_input_chunk_get_type(chunk) != MTMD_INPUT_CHUNK_TYPE_IMAGE) {
            continue;
        }
        if (mtmd_encode_chunk(context, chunk) != 0) {
            fail("mtmd_encode_chunk failed");
        }
        const size_t n = mtmd_input_chunk_get_n_tokens(chunk) * llama_model_n_embd_inp(model);
        write_floats(mtmd_get_output_embd(context), n);
    }
    mtmd_input_chunks_free(chunks);
    mtmd_bitmap_free(bitmap);
    mtmd_free(context);
    llama_model_free(model);
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (!(mode == "text" && argc > 5) && !(mode == "image" && argc == 6)) {
        fail("usage: text MODEL N_BATCH REPACK ID... | image MODEL MMPROJ WIDTH HEIGHT");
    }
    ggml_backend_load_all();  // where backends are libraries of their own
    llama_backend_init();
    std::fprintf(stderr, "system: %s\n", llama_print_system_info());
    if (mode == "text") {
        std::vector<llama_token> ids;
        for (int i = 5; i < argc; i++) {
            ids.push_back(std::atoi(argv[i]));
        }
        print_logits(argv[2], std::atoi(argv[3]), std::atoi(argv[4]) != 0, ids);
    } else {
        print_embeddings(argv[2], argv[3], std::atoi(argv[4]), std::atoi(argv[5]));
    }
    return 0;
}
