package aegis_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"net/netip"
	"net/url"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/vmihailenco/msgpack/v5"
)

// gobbledygook is a codec as a user might define it: JSON with every bit flipped.
type gobbledygook struct{}

func (gobbledygook) ContentType() string { return "application/gobbledygook" }

func (gobbledygook) Marshal(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	return flip(data), err
}

func (gobbledygook) Unmarshal(data []byte, v any) error { return json.Unmarshal(flip(data), v) }

func flip(data []byte) []byte {
	out := make([]byte, len(data))
	for i, b := range data {
		out[i] = ^b
	}
	return out
}

type everything struct {
	B     bool
	I     int64 `json:"i"`
	U     uint8
	F     float64
	S     string `json:"s,omitempty"`
	D     []byte
	L     []string
	M     map[string]int
	P     *everything `json:"p,omitempty"`
	T     time.Time
	Any   any
	Skip  string `json:"-"`
	inner int
}

func TestCodecs(t *testing.T) {
	t.Parallel()
	in := everything{B: true, I: -5, U: 200, F: 1.5, S: "ü", D: []byte{0, 255}, L: []string{"a", ""}, M: map[string]int{"x": 1},
		P: &everything{S: "deep"}, T: time.Unix(1e9, 5).UTC(), Any: "a", Skip: "skipped", inner: 3}
	want := in
	want.Skip, want.inner = "", 0
	for _, c := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
		data, err := c.Marshal(&in)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := c.Marshal(&in)
		if !bytes.Equal(data, again) {
			t.Errorf("%s: equal values have different encodings", c.ContentType())
		}
		var out everything
		if err := c.Unmarshal(data, &out); err != nil {
			t.Fatal(err)
		}
		out.T, out.P.T = out.T.UTC(), out.P.T.UTC()
		want := want
		want.P = out.P
		if out.P.S != "deep" || !reflect.DeepEqual(out, want) {
			t.Errorf("%s: got %+v, want %+v", c.ContentType(), out, want)
		}
		var raw map[string]any
		if err := c.Unmarshal(data, &raw); err != nil || raw["s"] != "ü" || raw["Skip"] != nil {
			t.Errorf("%s: got %v, %v", c.ContentType(), raw, err)
		}
	}
}

func TestMsgPackRejectsMalformedInput(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"empty input":           {},
		"the unused code 0xc1":  {0xc1},
		"two values":            {1, 2},
		"half a float":          {0xcb, 1, 2, 3},
		"half a string":         {0xd9, 5, 'a'},
		"half a length":         {0xdb, 0, 0},
		"an array of 4 billion": {0xdd, 0xff, 0xff, 0xff, 0xff},
		"a map of 4 billion":    {0xdf, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"bytes of 4 GB":         {0xc6, 0xff, 0xff, 0xff, 0xff, 1},
		"an extension of 4 GB":  {0xc9, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"a million levels":      append(bytes.Repeat([]byte{0x91}, 1_000_000), 1),
		"129 levels":            append(bytes.Repeat([]byte{0x91}, 129), 1),
		"a map without a value": {0x82, 1, 1, 2},
		"an unhashable key":     {0x81, 0x91, 1, 1},
	} {
		var m map[any]any
		if err := aegis.MsgPack.Unmarshal(data, &m); err == nil {
			t.Errorf("%s: no error", name)
		}
		var v any
		if err := aegis.MsgPack.Unmarshal(data, &v); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	var v any
	if err := aegis.MsgPack.Unmarshal(append(bytes.Repeat([]byte{0x91}, 128), 1), &v); err != nil {
		t.Error(err)
	}
}

// Types that encoding/json and msgpack v5 treat differently.
type (
	decimal  struct{ units int64 } // like shopspring's: JSON, text and binary, and IsZero
	isolated struct{ set bool }    // unexported fields and IsZero: {} in JSON
	base     struct {
		ID   string `json:"id"`
		Note string `json:"note"`
	}
	Anonymous struct{ Inner string }
	tree      struct {
		Name   string  `json:"name"`
		Parent *tree   `json:"parent,omitempty"`
		Kids   []*tree `json:"kids,omitempty"`
	}
	byteLike byte
	textKey  struct{ name string }
)

func (d decimal) MarshalJSON() ([]byte, error)  { return strconv.AppendQuote(nil, d.String()), nil }
func (d *decimal) UnmarshalJSON(b []byte) error { return d.UnmarshalText(bytes.Trim(b, `"`)) }
func (d decimal) MarshalText() ([]byte, error)  { return []byte(d.String()), nil }
func (d *decimal) UnmarshalText(b []byte) (err error) {
	d.units, err = strconv.ParseInt(string(b), 10, 64)
	return err
}
func (d decimal) MarshalBinary() ([]byte, error)  { return []byte(d.String()), nil }
func (d *decimal) UnmarshalBinary(b []byte) error { return d.UnmarshalText(b) }
func (d decimal) String() string                  { return strconv.FormatInt(d.units, 10) }
func (d decimal) IsZero() bool                    { return d.units == 0 }
func (i isolated) IsZero() bool                   { return !i.set }
func (k textKey) MarshalText() ([]byte, error)    { return []byte("key " + k.name), nil }
func (k *textKey) UnmarshalText(b []byte) error {
	k.name = strings.TrimPrefix(string(b), "key ")
	return nil
}

// TestMsgPackEqualsJSON checks that a value arrives in MessagePack as it does in JSON.
func TestMsgPackEqualsJSON(t *testing.T) {
	t.Parallel()
	zero, one, no := decimal{}, 1, false
	parent := &tree{Name: "root"}
	for range 200 {
		parent = &tree{Name: "child", Kids: []*tree{parent}}
	}
	for name, v := range map[string]any{
		"a type with MarshalJSON": payment{"a", "b", 1, money{18725}, true},
		"a pointer to it":         &payment{"a", "b", 1, money{18725}, true},
		"a list of them":          []money{{1}, {250}},
		"a map of them":           map[string]money{"x": {1}},
		"a decimal":               decimal{5},
		"an address":              netip.MustParseAddr("10.0.0.1"),
		"a big number":            big.NewInt(1 << 60),
		"a JSON number":           json.Number("12345678901234567890.5"),
		"a raw message":           struct{ R json.RawMessage }{json.RawMessage(`{"a":[1,null]}`)},
		"text keys":               map[textKey]int{{"a"}: 1},
		"integer keys":            map[int]string{-1: "a", 300: "b"},
		"unsigned keys":           map[uint8]string{0: "a", 255: "b"},
		"named strings":           map[byteLike][]byteLike{1: {1, 2}},
		"an array of bytes":       struct{ A [3]byte }{[3]byte{1, 2, 3}},
		"an array of named bytes": struct{ A [3]byteLike }{[3]byteLike{1, 2, 3}},
		"array in a map":          map[string][2]int{"a": {1, 2}},
		"omitempty, pointer to 0": struct {
			D *decimal `json:",omitempty"`
		}{&zero},
		"omitempty, decimal": struct {
			D decimal `json:",omitempty"`
		}{},
		"omitempty, any of 0": struct {
			V any `json:",omitempty"`
		}{0.0},
		"omitempty, any of false": struct {
			V any `json:",omitempty"`
		}{false},
		"omitempty, pointer": struct {
			P *bool `json:",omitempty"`
		}{&no},
		"omitempty, address": struct {
			A netip.Addr `json:",omitempty"`
		}{},
		"omitempty, big": &struct {
			B big.Int `json:",omitempty"`
		}{},
		"omitempty, IsZero": struct {
			I isolated `json:",omitempty"`
		}{},
		"omitempty, struct": struct {
			B base `json:",omitempty"`
		}{},
		"omitempty, time": struct {
			T time.Time `json:",omitempty"`
		}{},
		"omitempty, numbers": struct {
			A, B int     `json:",omitempty"`
			C    float64 `json:",omitempty"`
			D    []int   `json:",omitempty"`
		}{D: []int{}},
		"omitempty with a space": tagged(`json:"a, omitempty"`, ``),
		"omitzero": struct {
			A int       `json:",omitzero"`
			T time.Time `json:",omitzero"`
		}{},
		"string": struct {
			A int `json:",string"`
		}{5},
		"a field called -": struct {
			A int `json:"-,"`
		}{5},
		"a field left out": struct {
			A int `json:"-"`
			B int
		}{5, 6},
		"embedded": struct {
			Anonymous
			Own string
		}{Anonymous{"i"}, "o"},
		"embedded, unexported type": struct {
			base
			Own string
		}{base{"i", "n"}, "o"},
		"embedded with a name": struct {
			base `json:"meta"`
			ID   string `json:"id"`
		}{base{"i", "n"}, "o"},
		"embedded, exported, named": struct {
			Anonymous `json:"meta"`
		}{Anonymous{"i"}},
		"embedded, shadowed": struct {
			base
			ID string `json:"id"`
		}{base{"i", "n"}, "o"},
		"embedded pointer": struct {
			*Anonymous
			Own string
		}{&Anonymous{"i"}, "o"},
		"embedded pointer, nil": struct {
			*Anonymous
			Own string
		}{nil, "o"},
		"embedded pointer, inline": struct {
			*Anonymous `json:",inline"`
		}{&Anonymous{"i"}},
		"embedded, name taken": struct {
			Anonymous
			Own string `json:"Anonymous"`
		}{Anonymous{"i"}, "o"},
		"msgpack tag": struct {
			P float64 `msgpack:"px" json:"price"`
		}{5},
		"msgpack tag to leave out": struct {
			P float64 `msgpack:"-" json:"price"`
		}{5},
		"msgpack option": struct {
			P float64 `msgpack:",inline" json:"price"`
		}{5},
		"name with a colon": struct {
			P float64 `json:"a:b"`
		}{5},
		"name with a quote": struct {
			P float64 `json:"a'b"`
		}{5},
		"name with options": struct {
			P any `json:"p,intern"`
			Q int `json:"q,alias:p"`
		}{5.0, 6},
		"as array": struct {
			_msgpack struct{} `msgpack:",as_array"`
			A, B     int
		}{A: 1, B: 2},
		"the same name twice": tagged(`json:"x"`, `json:"x"`),
		"nested deeply":       parent,
		"nil":                 (*payment)(nil),
		"nil in everything":   everything{},
		"pointers": struct {
			P **int
			N **int
		}{P: new(&one)},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(name, err)
		}
		want, got := reflect.New(reflect.TypeOf(v)), reflect.New(reflect.TypeOf(v))
		if err := json.Unmarshal(text, want.Interface()); err != nil {
			t.Fatal(name, err)
		}
		data, err := aegis.MsgPack.Marshal(v)
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, got.Interface())
		}
		if err != nil || !reflect.DeepEqual(got.Interface(), want.Interface()) {
			t.Errorf("%s: sent %s\n%q arrives as %+v, want %+v, error %v", name, text, data, got.Elem(), want.Elem(), err)
		}
		again, err := json.Marshal(got.Interface())
		if err != nil || !bytes.Equal(text, again) && !strings.Contains(name, "twice") {
			t.Errorf("%s: sent %s, arrives as %s, %v", name, text, again, err)
		}
	}
}

// tagged returns a struct with these tags, which go vet would not let pass.
func tagged(tags ...reflect.StructTag) any {
	var fields []reflect.StructField
	for i, tag := range tags {
		fields = append(fields, reflect.StructField{Name: string(rune('A' + i)), Type: reflect.TypeFor[int](), Tag: tag})
	}
	return reflect.New(reflect.StructOf(fields)).Elem().Interface()
}

// TestMsgPackBetweenTypes checks what becomes of a value whose receiver has another type: what JSON makes of it, or an error.
func TestMsgPackBetweenTypes(t *testing.T) {
	t.Parallel()
	type small struct{ Qty int32 }
	for _, test := range []struct {
		name    string
		send    any
		receive any // a pointer
		want    any // nil for an error
		says    string
	}{
		{"int64 into int32", map[string]int64{"Qty": 5_000_000_000}, &small{}, nil, "Qty 5000000000 int32"},
		{"-1 into uint64", map[string]int64{"N": -1}, &struct{ N uint64 }{}, nil, "N -1"},
		{"-1 into uint8", int64(-1), new(uint8), nil, "-1 uint8"},
		{"256 into uint8", 256, new(uint8), nil, "256 uint8"},
		{"2^63 into int64", uint64(1) << 63, new(int64), nil, "9223372036854775808"},
		{"2^63 into float64", uint64(1) << 63, new(float64), float64(1 << 63), ""},
		{"2^63 into float32", uint64(1) << 63, new(float32), float32(1 << 63), ""},
		{"2^53+1 into float64", int64(1)<<53 + 1, new(float64), float64(1 << 53), ""},
		{"-5 into float64", -5, new(float64), -5.0, ""},
		{"float64 into float32", 0.1, new(float32), float32(0.1), ""},
		{"large float64 into float32", 1e300, new(float32), nil, "1e+300"},
		{"float32 into float64", float32(0.5), new(float64), 0.5, ""},
		{"fraction into int", 1.5, new(int), nil, "1.5"},
		{"bool into int", true, new(int), nil, "bool"},
		{"int into bool", 1, new(bool), nil, "number"},
		{"int into string", 1, new(string), nil, "number"},
		{"string into int", "1", new(int), nil, "string"},
		{"int8 range", -128, new(int8), int8(-128), ""},
		{"array into struct", []string{"alice", "bob"}, &struct{ A, B string }{}, nil, "array"},
		{"empty array into struct", []int{}, &struct{ A, B string }{}, nil, "array"},
		{"struct into slice", struct{ A int }{1}, &[]int{}, nil, "map"},
		{"string into struct", "x", &small{}, nil, "string"},
		{"bytes into string", []byte("x"), new(string), nil, "binary"},
		{"bytes into field", map[string][]byte{"Name": []byte("x")}, &struct{ Name string }{}, nil, "Name binary"},
		{"string into bytes", "not base 64!", &[]byte{}, nil, "base64"},
		{"base64 into bytes", "aGk=", &[]byte{}, []byte("hi"), ""},
		{"time into string", time.Unix(1e9, 0), new(string), nil, "timestamp"},
		{"string into time", "2026-11-26T10:00:00Z", &time.Time{}, time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC), ""},
		{"numbers into time", []int{1, 2}, &time.Time{}, nil, ""},
		{"text into address", "10.0.0.1", &netip.Addr{}, netip.MustParseAddr("10.0.0.1"), ""},
		{"bytes into money", map[string][]byte{"price": {1}}, &payment{}, nil, "binary"},
		{"string into money", map[string]string{"price": "5.20"}, &payment{}, payment{Price: money{520}}, ""},
		{"integer keys into string keys", map[int]string{7: "a"}, &map[string]string{}, map[string]string{"7": "a"}, ""},
		{"string keys into integer keys", map[string]string{"7": "a"}, &map[int]string{}, map[int]string{7: "a"}, ""},
		{"no number into integer keys", map[string]string{"x": "a"}, &map[int]string{}, nil, "x"},
		{"integer keys into struct", map[int]int{7: 1}, &struct {
			A int `json:"7"`
		}{}, struct {
			A int `json:"7"`
		}{1}, ""},
		{"integer keys into any", map[int]any{7: int8(7)}, new(any), map[string]any{"7": int64(7)}, ""},
		{"integer keys into map of any", map[int]any{7: uint16(7)}, &map[string]any{}, map[string]any{"7": int64(7)}, ""},
		{"boolean keys into any", map[bool]int{true: 1}, new(any), nil, "key"},
		{"longer array", []int{1, 2, 3}, &[2]int{}, nil, "array [2]int"},
		{"shorter array", []int{1}, &[2]int{}, nil, "array [2]int"},
		{"text that is no number into integer keys", map[string]int{"null": 1}, &map[int]int{}, nil, "null"},
		{"bytes into array", []byte{1, 2}, &[2]byte{}, [2]byte{1, 2}, ""},
		{"more bytes than the array", []byte{1, 2, 3}, &[2]byte{}, nil, ""},
		{"list into bytes", []int{1, 2}, &[]byte{}, []byte{1, 2}, ""},
		{"null into int", map[string]*int{"Qty": nil}, &small{}, small{}, ""},
		{"NaN", math.NaN(), new(int), nil, "NaN"},
		{"embedded struct's name", map[string]any{"Anonymous": map[string]any{"Inner": "x"}}, &struct{ Anonymous }{}, struct{ Anonymous }{}, ""},
		{"a name in another case", map[string]int{"qty": 1}, &small{}, small{}, ""},
	} {
		data, err := aegis.MsgPack.Marshal(test.send)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		err = aegis.MsgPack.Unmarshal(data, test.receive)
		got := reflect.ValueOf(test.receive).Elem().Interface()
		switch {
		case test.want == nil && err == nil:
			t.Errorf("%s: got %#v, want an error", test.name, got)
		case test.want != nil && (err != nil || !reflect.DeepEqual(got, test.want)):
			t.Errorf("%s: got %#v, %v, want %#v", test.name, got, err, test.want)
		}
		for word := range strings.FieldsSeq(test.says) {
			if err != nil && !strings.Contains(err.Error(), word) {
				t.Errorf("%s: the error %q does not name %q", test.name, err, word)
			}
		}
	}
}

// TestMsgPackAny checks the types that values in an any have when they arrive.
func TestMsgPackAny(t *testing.T) {
	t.Parallel()
	at := time.Unix(1e9, 5)
	type holder struct {
		V    any
		List []any
		Map  map[string]any
		Ptr  *any
		Deep []map[string]struct{ V any }
	}
	var nested any = float32(0.5)
	for _, test := range []struct{ send, want any }{
		{7, int64(7)}, {int8(-1), int64(-1)}, {300, int64(300)}, {70_000, int64(70_000)}, {uint64(7), int64(7)}, {uint64(1 << 63), uint64(1 << 63)},
		{int64(math.MaxInt64), int64(math.MaxInt64)}, {int64(math.MinInt64), int64(math.MinInt64)}, {-200, int64(-200)}, {-70_000, int64(-70_000)},
		{float32(0.5), 0.5}, {1.0, 1.0}, {"s", "s"}, {true, true}, {nil, nil}, {[]byte{1}, []byte{1}}, {[]int{1, 300}, []any{int64(1), int64(300)}},
		{struct{ A uint8 }{7}, map[string]any{"A": int64(7)}}, {map[int]uint16{-5: 300}, map[string]any{"-5": int64(300)}},
		{payment{Price: money{5}}, map[string]any{"account": "", "symbol": "", "quantity": 0.0, "price": "0.05", "buy": false}}, // sent as JSON
		{map[string]any{"a": map[string]any{"b": []any{uint8(1), 2.5}}}, map[string]any{"a": map[string]any{"b": []any{int64(1), 2.5}}}},
		{holder{V: 7, List: []any{uint8(1)}, Map: map[string]any{"a": 1}, Ptr: &nested, Deep: []map[string]struct{ V any }{{"x": {300}}}},
			map[string]any{"V": int64(7), "List": []any{int64(1)}, "Map": map[string]any{"a": int64(1)}, "Ptr": 0.5,
				"Deep": []any{map[string]any{"x": map[string]any{"V": int64(300)}}}}},
	} {
		var alone any
		var inside map[string]any
		for _, target := range []any{&alone, &inside} {
			send := test.send
			if target == any(&inside) {
				send = map[string]any{"v": send}
			}
			data, err := aegis.MsgPack.Marshal(send)
			if err == nil {
				err = aegis.MsgPack.Unmarshal(data, target)
			}
			if err != nil {
				t.Errorf("%#v: %v", test.send, err)
			}
		}
		if !reflect.DeepEqual(alone, test.want) || !reflect.DeepEqual(inside["v"], test.want) {
			t.Errorf("%#v arrives as %#v, and in a map as %#v, want %#v", test.send, alone, inside["v"], test.want)
		}
	}
	data, err := aegis.MsgPack.Marshal(holder{V: at, List: []any{uint8(1)}, Map: map[string]any{"a": 1}, Ptr: &nested,
		Deep: []map[string]struct{ V any }{{"x": {300}}}})
	var got holder
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &got)
	}
	if err != nil || !got.V.(time.Time).Equal(at) || got.List[0] != int64(1) || got.Map["a"] != int64(1) || *got.Ptr != any(0.5) ||
		got.Deep[0]["x"].V != int64(300) {
		t.Errorf("got %#v, %v", got, err)
	}
}

// TestMsgPackOneByte checks that a payload of one byte has one reading.
func TestMsgPackOneByte(t *testing.T) {
	t.Parallel()
	for n := range 300 {
		data, err := aegis.MsgPack.Marshal(n)
		var got int
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, &got)
		}
		if err != nil || got != n || len(data) == 1 && data[0] >= 48 && data[0] <= 57 {
			t.Errorf("%d is sent as %x and arrives as %d, %v", n, data, got, err)
		}
	}
	var got int
	if err := aegis.MsgPack.Unmarshal([]byte{0x37}, &got); err != nil || got != 0x37 { // as other libraries send it, labelled
		t.Error(got, err)
	}
	data, err := aegis.MsgPack.Marshal(digit(7))
	var d digit
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &d)
	}
	if err != nil || d != 7 {
		t.Errorf("%q arrives as %d, %v", data, d, err)
	}
}

type digit int

func (d digit) MarshalJSON() ([]byte, error)  { return strconv.AppendInt(nil, int64(d), 10), nil }
func (d *digit) UnmarshalJSON(b []byte) error { *d = digit(b[0] - '0'); return nil }

// TestMsgPackCarriesMoreThanJSON checks values that JSON can't express.
func TestMsgPackCarriesMoreThanJSON(t *testing.T) {
	t.Parallel()
	for _, v := range []any{
		math.Inf(1), math.Inf(-1), float32(math.Inf(1)), "not \xff UTF-8", map[float64]int{0.5: 1}, map[bool]string{true: "x"},
		struct{ F []float64 }{[]float64{math.Inf(-1), 0}}, &url.URL{Scheme: "http", Host: "host", RawQuery: "a=b"},
		struct{ U *url.URL }{&url.URL{Path: "/p"}}, time.Date(20000, 1, 1, 0, 0, 0, 0, time.Local),
	} {
		data, err := aegis.MsgPack.Marshal(v)
		got := reflect.New(reflect.TypeOf(v))
		if err == nil {
			err = aegis.MsgPack.Unmarshal(data, got.Interface())
		}
		if err != nil || !reflect.DeepEqual(got.Elem().Interface(), v) {
			t.Errorf("%#v arrives as %#v, %v", v, got.Elem(), err)
		}
	}
	data, err := aegis.MsgPack.Marshal(math.NaN())
	var got float64
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, &got)
	}
	if err != nil || !math.IsNaN(got) {
		t.Error(got, err)
	}
}

// TestMsgPackFailsLikeJSON checks values that neither format can carry: an error, never a panic or a stack overflow.
func TestMsgPackFailsLikeJSON(t *testing.T) {
	t.Parallel()
	cycle := &tree{Name: "a"}
	cycle.Kids = []*tree{{Name: "b", Parent: cycle}}
	self := map[string]any{}
	self["self"] = self
	list := []any{1, nil}
	list[1] = &list
	type node struct{ Next any }
	ring := &node{}
	ring.Next = ring
	type endless map[string]endless
	turtles := endless{}
	turtles["down"] = turtles
	for name, v := range map[string]any{
		"a tree whose child points to its parent": cycle,
		"a map that contains itself":              self,
		"a list that contains itself":             list,
		"a ring through an any":                   ring,
		"a map of its own type":                   turtles,
		"a channel":                               make(chan int),
		"a function":                              struct{ F func() }{},
		"a complex number":                        struct{ C complex128 }{},
		"a channel in an any":                     map[string]any{"c": make(chan int)},
		"struct keys":                             map[struct{ A int }]int{{1}: 1},
		"keys of any type":                        map[any]any{1: 1},
		"a MarshalJSON that panics":               panics{},
		"one in an any":                           map[string]any{"p": &panics{}},
		"a MarshalJSON that fails":                refuses{},
	} {
		if data, err := aegis.MsgPack.Marshal(v); err == nil {
			t.Errorf("%s: sent as %q, want an error", name, data)
		}
	}
	for _, target := range []any{nil, 5, (*int)(nil), &panics{}} {
		for _, data := range []string{`{"a":1}`, "\x81\xa1a\x01"} {
			if err := aegis.MsgPack.Unmarshal([]byte(data), target); err == nil {
				t.Errorf("Unmarshal into %T: no error", target)
			}
		}
	}
}

type (
	panics  struct{}
	refuses struct{}
)

func (panics) MarshalJSON() ([]byte, error)  { panic("MarshalJSON") }
func (*panics) UnmarshalJSON([]byte) error   { panic("UnmarshalJSON") }
func (refuses) MarshalJSON() ([]byte, error) { return nil, errors.New("no") }

// TestMsgPackReusedTarget checks that Unmarshal treats what the target holds already as encoding/json does.
func TestMsgPackReusedTarget(t *testing.T) {
	t.Parallel()
	type inner struct{ A, B int }
	type target struct {
		N    int
		P    *inner
		M    map[string]int
		L    []inner
		Any  any
		S, U string
	}
	fresh := func() *target {
		return &target{N: 1, P: &inner{1, 2}, M: map[string]int{"old": 1}, L: []inner{{1, 2}, {3, 4}}, Any: []any{"x"}, S: "s", U: "u"}
	}
	update := map[string]any{"N": nil, "P": map[string]any{"A": 5}, "M": map[string]any{"new": 2}, "L": []any{map[string]any{"A": 9}}, "Any": "y", "S": nil}
	text, _ := json.Marshal(update)
	data, err := aegis.MsgPack.Marshal(update)
	want, got := fresh(), fresh()
	if err == nil {
		err = aegis.MsgPack.Unmarshal(data, got)
	}
	if json.Unmarshal(text, want) != nil || err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v, error %v", got, want, err)
	}
	var v any
	for _, send := range []any{[]byte{1}, 7, map[string]any{"a": 1}, nil, "s"} {
		data, _ := aegis.MsgPack.Marshal(send)
		var once any
		if err1, err2 := aegis.MsgPack.Unmarshal(data, &v), aegis.MsgPack.Unmarshal(data, &once); err1 != nil || err2 != nil || !reflect.DeepEqual(v, once) {
			t.Errorf("again: %#v, into a new any: %#v, %v, %v", v, once, err1, err2)
		}
	}
}

// TestMsgPackOfOlderVersions checks that payloads of v0.1.0 are still understood: these are stored in streams.
func TestMsgPackOfOlderVersions(t *testing.T) {
	t.Parallel()
	enc := func(v any) []byte {
		var buf bytes.Buffer
		e := msgpack.NewEncoder(&buf)
		e.SetCustomStructTag("json")
		e.UseCompactInts(true)
		if err := e.Encode(v); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	type order struct {
		ID    decimal // as MarshalBinary made it
		From  netip.Addr
		Bytes [2]byte
		At    time.Time
		Tree  *tree
	}
	in := order{decimal{5}, netip.MustParseAddr("::1"), [2]byte{1, 2}, time.Unix(1e9, 0), &tree{Name: "a", Kids: []*tree{{Name: "b"}}}}
	var out order
	if err := aegis.MsgPack.Unmarshal(enc(in), &out); err != nil || !reflect.DeepEqual(in, out) {
		t.Errorf("got %+v, %v, want %+v", out, err, in)
	}
}

// FuzzMsgPack checks that malformed input causes no panic, and no more allocations than are proportionate to its length.
func FuzzMsgPack(f *testing.F) {
	for _, v := range []any{1, "s", []int{1, 2}, map[string]any{"i": 1, "L": []string{"a"}, "P": map[string]any{"M": map[string]int{"x": 1}}}, everything{}} {
		data, err := aegis.MsgPack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'L', 0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'M', 0xdf, 0x00, 0xff, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0x91}, 200))
	element := uint64(reflect.TypeFor[everything]().Size())
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var list []everything
		_ = aegis.MsgPack.Unmarshal(data, &list)
		var one everything
		_ = aegis.MsgPack.Unmarshal(data, &one)
		var v any
		_ = aegis.MsgPack.Unmarshal(data, &v)
		runtime.ReadMemStats(&after)
		if got, most := after.TotalAlloc-before.TotalAlloc, 256<<10+uint64(len(data))*4*element; got > most {
			t.Errorf("%d bytes of input took %d bytes of memory, want at most %d", len(data), got, most)
		}
	})
}
