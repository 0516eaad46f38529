// Messages to the text the model reads, and its token bytes to the text a person reads.
//
// The prompt is the one of autoglm_gguf/prompt.py under AutoGLM's chat template. Knows no llama.cpp.

enum Role: String, Sendable { case system, user, assistant }

struct Message: Sendable {
    var role: Role
    var text: String
    /// Stands before the text, as the phone agent sends it.
    var image: RGBImage?
}

enum SpecialToken {
    static let beginOfImage = "<|begin_of_image|>"
    static let endOfImage = "<|end_of_image|>"
    /// Each of them ends a turn; a pair from another converter may name fewer in its file.
    static let stop = ["<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"]
    /// Shown although some checkpoints mark them as control tokens: the action is parsed out of them.
    static let tags = ["<think>", "</think>", "<answer>", "</answer>"]
}

/// `segments[0] image segments[1] image …`, ending with the assistant's header.
///
/// Images leave a gap instead of a marker, so nothing a person types is taken for one.
func renderPrompt(_ messages: [Message]) -> [String] {
    var segments = ["[gMASK]<sop>"]
    func write(_ text: String) { segments[segments.count - 1] += text }
    for message in messages {
        write("<|\(message.role.rawValue)|>\n")
        if message.image != nil {
            write(SpecialToken.beginOfImage)
            segments.append(SpecialToken.endOfImage)
        }
        write(message.text)
    }
    write("<|assistant|>\n")
    return segments
}

/// Describes the action language, in the task's language; autoglm_gguf/actions.py has the same.
func systemPrompt(for task: String) -> String {
    let isChinese = task.unicodeScalars.contains { (0x4E00...0x9FFF).contains($0.value) }
    return (isChinese ? systemPromptChinese : systemPromptEnglish) + actionList
}

private let systemPromptChinese =
    "你是手机操作助手。先在<think>里简短思考，再在<answer>里给出一个操作，坐标范围是0到999：\n"
private let systemPromptEnglish =
    "You operate a phone. Think briefly in <think>, then give one action in <answer>; "
    + "coordinates run from 0 to 999:\n"
private let actionList = """
    do(action="Launch", app="…")
    do(action="Tap", element=[x,y])
    do(action="Tap", element=[x,y], message="…")
    do(action="Type", text="…")
    do(action="Type_Name", text="…")
    do(action="Interact")
    do(action="Swipe", start=[x1,y1], end=[x2,y2])
    do(action="Note", message="True")
    do(action="Call_API", instruction="…")
    do(action="Long Press", element=[x,y])
    do(action="Double Tap", element=[x,y])
    do(action="Take_over", message="…")
    do(action="Back")
    do(action="Home")
    do(action="Wait", duration="x seconds")
    finish(message="…")
    """

/// Holds back a character until its last byte is there: a token may end inside one.
struct TextStream {
    private var held: [UInt8] = []

    mutating func push(_ bytes: [UInt8]) -> String {
        held += bytes
        let whole = held.count - unfinished
        defer { held.removeFirst(whole) }
        return String(decoding: held[..<whole], as: UTF8.self)
    }

    /// What is left; an unfinished character becomes U+FFFD.
    mutating func finish() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    /// Bytes at the end that begin a character and do not complete it.
    private var unfinished: Int {
        for length in 1...3 where length <= held.count {
            let byte = held[held.count - length]
            if byte & 0xC0 == 0x80 { continue }  // a continuation: look further left
            let needed = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
            return needed > length ? length : 0
        }
        return 0
    }
}
