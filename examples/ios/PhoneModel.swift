// AutoGLM's GGUF pair on llama.cpp's C interface (llama.h, mtmd.h, gguf.h of commit 0c1e57098).
//
// One model, one sequence, one thread that evaluates; answers queue. The weights stay in the mapped
// file, the vision tower is in memory only while an image is encoded.

import Foundation
import llama

struct ModelError: LocalizedError {
    let errorDescription: String?
    let recoverySuggestion: String?

    init(_ what: String, hint: String) { (errorDescription, recoverySuggestion) = (what, hint) }
}

final class PhoneModel: @unchecked Sendable {  // its state is touched on `queue` alone
    struct Options: Sendable {
        /// KV cells: text and image tokens, prompt and answer. 40,960 bytes each for the 9B.
        var contextLength: UInt32 = 4096
        /// Tokens evaluated at once; a cancel is noticed between batches.
        var batchSize: Int32 = 256
        /// Layers on the GPU; -1 means all.
        var gpuLayers: Int32 = -1
        /// 1080 x 2400 takes 3108 without a limit; encoding costs grow with the square.
        var maxImageTokens: Int? = 1620
        var threads = Int32(max(1, min(6, ProcessInfo.processInfo.activeProcessorCount)))
    }

    private static let backend: Void = llama_backend_init()
    private let queue = DispatchQueue(label: "autoglm.model", qos: .userInitiated)
    private let options: Options
    private let model: OpaquePointer
    private let context: OpaquePointer
    private let vocabulary: OpaquePointer
    private let tower: (path: String, limits: ImageLimits)?
    private var batch: llama_batch
    private var stopTokens: Set<llama_token> = []
    private var tags: Set<llama_token> = []
    /// Of the next token. After an image it is behind the number of cells (M-RoPE).
    private var position: llama_pos = 0

    /// Loads the pair. Takes seconds: not on the main thread.
    init(text: URL, mmproj: URL?, options: Options = Options()) throws {
        _ = Self.backend
        self.tower = try mmproj.map { ($0.path, try Self.readLimits($0)) }
        var options = options
        #if targetEnvironment(simulator)
        options.gpuLayers = 0  // the simulator's Metal lacks what the kernels need
        #endif
        var modelParams = llama_model_default_params()
        modelParams.n_gpu_layers = options.gpuLayers
        modelParams.load_mode = LLAMA_LOAD_MODE_MMAP  // clean pages, which iOS does not count
        modelParams.use_extra_bufts = false  // no second copy of the weights for CPU kernels
        guard let model = llama_model_load_from_file(text.path, modelParams) else {
            throw ModelError(
                "\(text.lastPathComponent): llama.cpp could not load the model",
                hint: "copy the file again; the log says more")
        }
        var contextParams = llama_context_default_params()
        contextParams.n_ctx = options.contextLength
        contextParams.n_batch = UInt32(options.batchSize)
        contextParams.n_ubatch = contextParams.n_batch
        contextParams.n_outputs_max = 1  // one row of logits instead of a batch of them
        contextParams.op_offload = false  // or large batches go to the GPU even with no layer there
        contextParams.n_threads = options.threads
        contextParams.n_threads_batch = options.threads
        guard let context = llama_init_from_model(model, contextParams),
            let vocabulary = llama_model_get_vocab(model)
        else {
            llama_model_free(model)
            throw ModelError(
                "no context of \(options.contextLength) tokens", hint: "make contextLength smaller")
        }
        (self.options, self.model, self.context) = (options, model, context)
        (self.vocabulary, self.batch) = (vocabulary, llama_batch_init(options.batchSize, 0, 1))
        self.stopTokens = Set(SpecialToken.stop.compactMap(single))
        self.tags = Set(SpecialToken.tags.compactMap(single))
    }

    deinit {
        llama_batch_free(batch)
        llama_free(context)
        llama_model_free(model)
    }

    /// Streams one answer; ending the stream, or the task that reads it, ends the work.
    func answer(_ messages: [Message], maxTokens: Int = 512) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let stop = StopFlag()
            continuation.onTermination = { _ in stop.set() }
            queue.async {
                do {
                    try self.run(messages, maxTokens, stop) { if !$0.isEmpty { continuation.yield($0) } }
                    continuation.finish()
                } catch { continuation.finish(throwing: error) }
            }
        }
    }

    private func run(
        _ messages: [Message], _ maxTokens: Int, _ stop: StopFlag, emit: (String) -> Void
    ) throws {
        let segments = renderPrompt(messages).map(tokenize)
        let images = try messages.compactMap(\.image).map { image in
            guard let tower else {
                throw ModelError("this model takes no images", hint: "load it with its mmproj file")
            }
            return try image.fitted(to: tower.limits, maxImageTokens: options.maxImageTokens)
        }
        let promptCount = segments.map(\.count).reduce(0, +) + images.map(imageTokens).reduce(0, +)
        let cells = Int(llama_n_ctx(context))
        guard promptCount < cells else {
            throw ModelError(
                "prompt: \(promptCount) tokens do not fit the context of \(cells)",
                hint: "raise contextLength or lower maxImageTokens")
        }
        llama_memory_clear(llama_get_memory(context), false)
        position = 0
        for (index, segment) in segments.enumerated() {
            for start in stride(from: 0, to: segment.count, by: Int(options.batchSize)) {
                if stop.isSet { return }
                try decode(segment[start..<min(start + Int(options.batchSize), segment.count)])
            }
            if index < images.count {
                if stop.isSet { return }
                try decode(images[index])
            }
        }
        let sampler = llama_sampler_chain_init(llama_sampler_chain_default_params())
        defer { llama_sampler_free(sampler) }
        llama_sampler_chain_add(sampler, llama_sampler_init_greedy())
        var text = TextStream()
        for _ in 0..<min(maxTokens, cells - promptCount) {
            let token = llama_sampler_sample(sampler, context, -1)
            if stop.isSet { return }
            if stopTokens.contains(token) || llama_vocab_is_eog(vocabulary, token) { break }
            emit(text.push(bytes(of: token)))
            try decode([token])
        }
        emit(text.finish())
    }

    /// Evaluates tokens and keeps the logits of the last one.
    private func decode(_ tokens: ArraySlice<llama_token>) throws {
        batch.n_tokens = Int32(tokens.count)
        for (row, token) in tokens.enumerated() {
            batch.token[row] = token
            batch.pos[row] = position + llama_pos(row)  // given: llama.cpp would count an image as 1
            batch.n_seq_id[row] = 1
            batch.seq_id[row]![0] = 0
            batch.logits[row] = row == tokens.count - 1 ? 1 : 0
        }
        let status = llama_decode(context, batch)
        guard status == 0 else { throw evaluationError("decode", status) }
        position += llama_pos(tokens.count)
    }

    /// Encodes an image and evaluates its embeddings; the tower is freed at the end.
    private func decode(_ image: RGBImage) throws {
        let rope = llama_model_rope_type(model)
        guard let tower, rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE else {
            // llama.cpp ends the process on an image without M-RoPE.
            throw ModelError(
                "this text model takes no images (no rope.dimension_sections)",
                hint: "convert the checkpoint again with autoglm-gguf convert")
        }
        var towerParams = mtmd_context_params_default()
        towerParams.use_gpu = options.gpuLayers != 0
        towerParams.print_timings = false
        towerParams.n_threads = options.threads
        towerParams.warmup = false  // it would reserve 496 MiB whatever the limit
        towerParams.image_min_tokens = 1  // the size is chosen already
        towerParams.image_max_tokens = Int32(max(imageTokens(image), 4096))
        guard let vision = mtmd_init_from_file(tower.path, model, towerParams) else {
            throw ModelError("libmtmd could not load the mmproj", hint: "copy the file again")
        }
        defer { mtmd_free(vision) }
        guard let chunks = mtmd_input_chunks_init() else { throw evaluationError("image", -1) }
        defer { mtmd_input_chunks_free(chunks) }
        guard let chunk = prepare(image, vision, chunks),
            mtmd_input_chunk_get_n_tokens(chunk) == imageTokens(image)
        else { throw ModelError("libmtmd changed the image's size", hint: "report this") }
        var status = mtmd_encode_chunk(vision, chunk)
        guard status == 0 else { throw evaluationError("image encode", status) }
        status = mtmd_helper_decode_image_chunk(
            vision, context, chunk, mtmd_get_output_embd(vision), position, 0, options.batchSize,
            &position, nil, nil)
        guard status == 0 else { throw evaluationError("image decode", status) }
    }

    /// The image as libmtmd's chunk, owned by `chunks`.
    private func prepare(
        _ image: RGBImage, _ vision: OpaquePointer, _ chunks: OpaquePointer
    ) -> OpaquePointer? {
        // libmtmd copies the pixels.
        let bitmap = mtmd_bitmap_init(UInt32(image.width), UInt32(image.height), image.pixels)
        defer { mtmd_bitmap_free(bitmap) }
        let marker = mtmd_get_marker(vision)
        var text = mtmd_input_text(
            text: marker, text_len: strlen(marker!), add_special: false, parse_special: true)
        var bitmaps: [OpaquePointer?] = [bitmap]
        guard mtmd_tokenize(vision, chunks, &text, &bitmaps, 1) == 0 else { return nil }
        return (0..<mtmd_input_chunks_size(chunks)).lazy
            .map { mtmd_input_chunks_get(chunks, $0) }
            .first { mtmd_input_chunk_get_type($0) == MTMD_INPUT_CHUNK_TYPE_IMAGE } ?? nil
    }

    private func imageTokens(_ image: RGBImage) -> Int {
        let factor = tower?.limits.factor ?? ImageLimits().factor
        return (image.width / factor) * (image.height / factor)
    }

    private func tokenize(_ text: String) -> [llama_token] {
        let count = text.utf8.count
        return [llama_token](unsafeUninitializedCapacity: count + 8) { ids, filled in
            // Special tokens written literally become their ids; none is added.
            let n = llama_tokenize(
                vocabulary, text, Int32(count), ids.baseAddress, Int32(ids.count), false, true)
            filled = max(0, Int(n))
        }
    }

    private func single(_ name: String) -> llama_token? {
        let ids = tokenize(name)
        return ids.count == 1 ? ids[0] : nil
    }

    private func bytes(of token: llama_token) -> [UInt8] {
        var piece = [CChar](repeating: 0, count: 256)  // the longest tokens of GLM have 128 bytes
        let n = llama_token_to_piece(vocabulary, token, &piece, 256, 0, tags.contains(token))
        return piece.prefix(max(0, Int(n))).map { UInt8(bitPattern: $0) }
    }

    private func evaluationError(_ what: String, _ status: Int32) -> ModelError {
        ModelError(
            "llama.cpp: \(what) failed (status \(status))",
            hint: "load the model again: iOS takes the GPU from an app that leaves the screen")
    }

    /// The image limits that autoglm-gguf writes into the mmproj; GLM-4.1V's where it has none.
    private static func readLimits(_ mmproj: URL) throws -> ImageLimits {
        guard let file = gguf_init_from_file(mmproj.path, gguf_init_params(no_alloc: true, ctx: nil))
        else { throw ModelError("\(mmproj.lastPathComponent): no GGUF file", hint: "copy it again") }
        defer { gguf_free(file) }
        func number(_ key: String) -> Int? {
            let id = gguf_find_key(file, key)
            guard id >= 0 else { return nil }
            switch gguf_get_kv_type(file, id) {
            case GGUF_TYPE_UINT32: return Int(gguf_get_val_u32(file, id))
            case GGUF_TYPE_UINT64: return Int(exactly: gguf_get_val_u64(file, id))
            default: return nil
            }
        }
        var limits = ImageLimits()
        limits.patchSize = number("clip.vision.patch_size") ?? limits.patchSize
        limits.mergeSize = number("autoglm.vision.spatial_merge_size") ?? limits.mergeSize
        limits.minPixels = number("autoglm.vision.min_pixels") ?? limits.minPixels
        limits.maxPixels = number("autoglm.vision.max_pixels") ?? limits.maxPixels
        return limits
    }
}

/// Set from any thread, read by the one that evaluates.
private final class StopFlag: @unchecked Sendable {
    private let lock = NSLock()
    private var value = false

    var isSet: Bool { lock.withLock { value } }

    func set() { lock.withLock { value = true } }
}
